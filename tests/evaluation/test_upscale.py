"""Colour fixes and running a pipeline over tensors and files."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from _support import picked
from PIL import Image

from rewardsr import load_adapter
from rewardsr.batch import Batch
from rewardsr.data.images import read_image, write_image
from rewardsr.draws import Draws
from rewardsr.errors import UserError
from rewardsr.evaluation.colour import adain, fix_color, wavelet
from rewardsr.evaluation.upscale import upscale, upscale_tensor


@pytest.fixture(scope="module")
def adapter(tiny):
    """One step with noise, four times."""
    return load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=4)


def image(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- colour fixes ----


@pytest.mark.parametrize("fix", [adain, wavelet])
@pytest.mark.parametrize("case", ["astro", "flat_target_gradient_source"])
def test_colour_fix_agrees_with_the_original(golden, fix, case) -> None:
    """At most one level off, on less than 0.5 % of the values; the original truncates to 8 bit."""
    vectors = golden("colorfix")
    target, source = (vectors[f"{case}.{name}"].permute(2, 0, 1)[None].float() / 255 for name in ("target", "source"))
    ours = fix(target, source)[0].permute(1, 2, 0)
    off = ((ours * 255).to(torch.uint8).int() - vectors[f"{case}.{fix.__name__}"].int()).abs()
    assert int(off.max()) <= 1
    assert float((off > 0).float().mean()) < 0.005
    if case == "astro":
        values, theirs = picked(ours, vectors, f"astro.{fix.__name__}_float")
        assert torch.allclose(values, theirs.clamp(0, 1), atol=2e-6)


@pytest.mark.parametrize("name", ["none", "adain", "wavelet"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (30, 41)])
def test_an_identical_image_stays_as_it_is(name, size) -> None:
    original = image(0, 2, 3, *size)
    assert torch.allclose(fix_color(original, original, name), original, atol=1 / 255)


@pytest.mark.parametrize("fix", [adain, wavelet])
def test_a_colour_cast_is_taken_back(fix) -> None:
    reference = 0.25 + 0.4 * image(0, 1, 3, 48, 48)
    cast = reference + torch.tensor([0.1, -0.05, 0.02]).view(1, 3, 1, 1)
    assert torch.allclose(fix(cast, reference), reference, atol=1 / 255)


def test_each_image_of_a_batch_has_its_own_statistics() -> None:
    sr, reference = image(0, 2, 3, 16, 16), 0.5 * image(1, 2, 3, 16, 16)
    for fix in (adain, wavelet):
        assert torch.allclose(fix(sr, reference)[1:], fix(sr[1:], reference[1:]), atol=1e-6)


def test_wavelet_needs_one_shape() -> None:
    with pytest.raises(ValueError, match="reference is"):
        wavelet(torch.rand(1, 3, 8, 8), torch.rand(1, 3, 4, 4))


def test_unknown_colour_fix(adapter) -> None:
    with pytest.raises(UserError, match="none, adain, wavelet"):
        upscale_tensor(adapter, torch.rand(1, 3, 8, 8), None, Draws(0, 0, [0]), "ycc")


# ---- tensors ----


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 16)])
def test_output_is_exactly_scale_times_the_input(adapter, size) -> None:
    sr = upscale_tensor(adapter, image(0, 2, 3, *size), ["a", "b"], Draws(0, 0, [0, 1]), "wavelet")
    assert sr.shape == (2, 3, 4 * size[0], 4 * size[1]) and sr.dtype == torch.float32
    assert float(sr.min()) >= 0 and float(sr.max()) <= 1
    assert not sr.requires_grad


def test_noise_decides_and_nothing_else(adapter) -> None:
    lq = image(0, 1, 3, 8, 8)
    first, again, other = (upscale_tensor(adapter, lq, None, Draws(seed, 0, [0])) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_batch_brings_its_prompts(adapter) -> None:
    lq = image(0, 1, 3, 8, 8)
    bare = upscale_tensor(adapter, lq, ["a cat"], Draws(0, 0, [0]))
    assert torch.equal(upscale_tensor(adapter, Batch(lq, prompts=("a cat",)), generator=Draws(0, 0, [0])), bare)


def test_colour_fix_is_against_the_enlarged_input(adapter) -> None:
    lq = image(0, 1, 3, 8, 8)
    plain, fixed = (upscale_tensor(adapter, lq, None, Draws(0, 0, [0]), name) for name in ("none", "adain"))
    assert torch.equal(fixed, adain(plain, adapter.upsample(lq)))


# ---- files ----


@pytest.fixture
def inputs(tmp_path) -> list[Path]:
    return [write_image(image(n, 3, 6 + n, 8), tmp_path / "in" / f"{name}.png") for n, name in enumerate("ab")]


def test_files(adapter, inputs, tmp_path, caplog) -> None:
    caplog.set_level("INFO", "rewardsr")
    written = upscale(adapter, inputs, tmp_path / "out", seed=3)
    assert written == [tmp_path / "out" / "a.png", tmp_path / "out" / "b.png"]
    assert caplog.messages == [f"1/2 {written[0]}", f"2/2 {written[1]}"]
    for index, (path, target) in enumerate(zip(inputs, written, strict=True)):
        sr = upscale_tensor(adapter, read_image(path)[None], None, Draws(3, 0, [index], "upscale"))
        assert torch.equal(read_image(target), (sr[0] * 255).round() / 255)


def test_whatever_holds_the_images_the_pictures_are_the_same(adapter, inputs, tmp_path, monkeypatch) -> None:
    written = [path.read_bytes() for path in upscale(adapter, inputs, tmp_path / "out")]
    pictures = [Image.open(path) for path in inputs]
    monkeypatch.chdir(tmp_path)
    for same in (
        inputs[0].parent,
        "in",
        [str(path) for path in inputs],
        [Path("in")],
        pictures,
        (inputs[0], pictures[1]),
    ):
        found = upscale(adapter, same)
        assert all(isinstance(image, Image.Image) and image.mode == "RGB" for image in found)
        for image, content in zip(found, written, strict=True):
            assert image.tobytes() == Image.open(io.BytesIO(content)).tobytes()
    for one in (inputs[0], str(inputs[0]), pictures[0]):
        assert upscale(adapter, one)[0].tobytes() == Image.open(io.BytesIO(written[0])).tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    numbered = upscale(adapter, pictures, "numbered")
    assert numbered == [Path("numbered/000.png"), Path("numbered/001.png")]
    assert [path.read_bytes() for path in numbered] == written
    (tmp_path / "000.txt").write_text("of another image")
    with pytest.raises(UserError, match="PIL image has none"):
        upscale(adapter, pictures, prompts="sidecar")
    told = [upscale(adapter, images, prompts="a cat")[0].tobytes() for images in (pictures, inputs)]
    assert told[0] == told[1] != upscale(adapter, inputs)[0].tobytes()


def test_arrays_tensors_and_mixtures_of_them(adapter, inputs, tmp_path) -> None:
    expected = [picture.tobytes() for picture in upscale(adapter, inputs)]
    arrays = [np.array(Image.open(path)) for path in inputs]
    tensors = [read_image(path) for path in inputs]
    levels = [torch.from_numpy(array).permute(2, 0, 1) for array in arrays]
    for images in (
        arrays,
        tensors,
        levels,
        [inputs[0], arrays[1]],
        (str(inputs[0]), tensors[1]),
        (path for path in inputs),
        [tensors[0][None], Image.open(inputs[1])],
        {inputs[0]: "a mapping has keys", inputs[1]: ""},
    ):
        assert [picture.tobytes() for picture in upscale(adapter, images)] == expected
    for one in (arrays[0], tensors[0], levels[0], tensors[0][None]):
        assert [picture.tobytes() for picture in upscale(adapter, one)] == expected[:1]
    twins = upscale(adapter, torch.stack([tensors[0], tensors[0]]))
    assert len(twins) == 2 and twins[0].tobytes() == expected[0] != twins[1].tobytes(), "another place, other noise"
    mixed = upscale(adapter, [arrays[0], inputs[1]], tmp_path / "mixed")
    assert [path.name for path in mixed] == ["000.png", "b.png"]
    with pytest.raises(UserError, match=r"'.*001\.png' and image 1 would both become"):
        upscale(adapter, [write_image(tensors[0], tmp_path / "001.png"), arrays[0]], tmp_path / "out")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images to upscale"),
        ((path for path in ()), "no images to upscale"),
        (None, "cannot upscale NoneType: give files, folders, PIL images, arrays"),
        (3, "cannot upscale int"),
        (b"photo.png", "cannot upscale int"),
        ([["photo.png"]], "cannot upscale list"),
        (np.zeros((4, 4, 3)), r"cannot upscale ndarray float64 \(4, 4, 3\)"),
        (np.zeros(5, np.uint8), r"cannot upscale ndarray uint8 \(5,\)"),
        (np.zeros((3, 9, 9), np.uint8), r"cannot upscale ndarray uint8 \(3, 9, 9\)"),
        (torch.zeros(4, 4, 3), r"cannot upscale Tensor torch.float32 \(4, 4, 3\)"),
        (torch.zeros(3, 0, 4), "cannot upscale Tensor"),
        (torch.full((3, 4, 4), -1.0), r"values of -1 to -1, expected \[0, 1\]"),
        (torch.full((3, 4, 4), torch.nan), r"values of nan to nan, expected"),
        ("~nosuchuser/a.png", "no home folder of ~nosuchuser"),
        ("a\0b.png", "a character that no file name can hold"),
        ("n" * 300 + ".png", "too long for a file name"),
    ],
)
def test_what_cannot_be_upscaled(adapter, tmp_path, images, message) -> None:
    with pytest.raises(UserError, match=message):
        upscale(adapter, images, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_home_folders(adapter, inputs, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "in")
    assert upscale(adapter, "~/in/a.png", "~/out") == [tmp_path / "out" / "a.png"]
    assert upscale(adapter, [Path("~/in")], Path("~/both")) == [tmp_path / "both" / f"{name}.png" for name in "ab"]
    assert sorted(path.name for path in Path().iterdir()) == ["a.png", "b.png"]


def test_sidecar_prompts(adapter, inputs, tmp_path) -> None:
    with pytest.raises(UserError, match="prompt file"):
        upscale(adapter, inputs, tmp_path / "out", prompts="sidecar")
    assert not (tmp_path / "out").exists()
    for path in inputs:
        path.with_suffix(".txt").write_text("a cat")
    with_files = upscale(adapter, inputs, tmp_path / "one", prompts="sidecar")
    with_text = upscale(adapter, inputs, tmp_path / "two", prompts="a cat")
    for one, two in zip(with_files, with_text, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_a_bad_input_stops_everything_before_it_begins(adapter, inputs, tmp_path) -> None:
    truncated = tmp_path / "in" / "c.png"
    truncated.write_bytes(inputs[0].read_bytes()[:-30])
    for bad in (truncated, tmp_path / "in" / "missing.png"):
        with pytest.raises(UserError, match=bad.name):
            upscale(adapter, [*inputs, bad], tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_inputs_are_never_overwritten(adapter, inputs) -> None:
    before = inputs[0].read_bytes()
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is an input"):
            upscale(adapter, inputs, inputs[0].parent / ".." / "in", overwrite=overwrite)
    link = inputs[0].parent.parent / "linked"
    link.symlink_to(inputs[0].parent)
    with pytest.raises(UserError, match="is an input"):
        upscale(adapter, inputs, link, overwrite=True)
    assert inputs[0].read_bytes() == before


def test_clashes(adapter, inputs, tmp_path) -> None:
    twin = write_image(image(5, 3, 8, 8), tmp_path / "other" / "A.png")
    with pytest.raises(UserError, match="would both become"):
        upscale(adapter, [*inputs, twin], tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.png").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"1 of the results already \(b\.png\)"):
        upscale(adapter, inputs, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]
    assert (tmp_path / "out" / "b.png").read_bytes() == b"precious"
    upscale(adapter, inputs, tmp_path / "out", overwrite=True)
    assert read_image(tmp_path / "out" / "b.png").shape == (3, 28, 32)


def test_no_inputs_and_no_folder(adapter, inputs, tmp_path) -> None:
    with pytest.raises(UserError, match="no images"):
        upscale(adapter, [], tmp_path / "out")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder where a result would go"):
        upscale(adapter, inputs, tmp_path / "out", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        upscale(adapter, inputs, tmp_path / "file")
