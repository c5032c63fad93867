"""Prompts and tensors beside images: which file belongs to which image, from the folder to the networks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from _matrix import write_extras
from _support import Commands
from safetensors.torch import load_file, save_file

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import open_data
from rewardsr.data.images import read_image, write_image
from rewardsr.data.sidecars import check_tensors, read_tensors, resolve_prompts, stack_tensors, tensor_files
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.testing import write_images

COUNT, LEVELS = 6, 255
COMMAND = ("--adapter", "seesr", "--option", "steps=2", "--device", "cpu")


@pytest.fixture
def marked(tmp_path) -> Path:
    """Images that are gray all over, each as bright as the one number in its file."""
    folder = tmp_path / "marked"
    folder.mkdir()
    for index in range(COUNT):
        gray = (20 + 30 * index) / LEVELS
        write_image(torch.full((3, 24, 24), gray), folder / f"{index:03}.png")
        save_file({"gray": torch.full((2, 3), gray), "other": torch.zeros(1)}, folder / f"{index:03}.safetensors")
    return folder


def moved(folder: Path) -> Path:
    """The same with its files of tensors in `extras/`."""
    (folder / "extras").mkdir()
    for path in folder.glob("*.safetensors"):
        path.rename(folder / "extras" / path.name)
    return folder


def opened(folder: Path, crop: int | None = 16, names: tuple[str, ...] = ("gray",)):
    plain = Light(LightOptions(blur=(0, 0), noise=(0, 0), quality=(100, 100)), 4)
    return open_data(folder, scale=4, crop=crop, degradation=plain, extras=names)


def assert_rows_fit(batch: Batch) -> None:
    """Every row carries the number of its own image."""
    assert batch.extras.keys() == {"gray"}
    given = batch.extras["gray"]
    assert given.shape == (len(batch), 2, 3) and given.dtype == torch.float32
    assert torch.allclose(given.mean((1, 2)), batch.hq.mean((1, 2, 3)), atol=1e-3)
    assert torch.allclose(given.mean((1, 2)), batch.lq.mean((1, 2, 3)), atol=1e-2)
    assert torch.equal(given, torch.stack([load_file(file_of(Path(path)))["gray"] for path in batch.paths]))


def file_of(image: Path) -> Path:
    """The file of an image, wherever a test has put it."""
    name = f"{image.stem}.safetensors"
    places = (image.parent, image.parent / "extras", image.parents[1] / "extras")
    return next(place / name for place in places if (place / name).is_file())


# ---- prompts ----


def test_prompts_lie_beside_the_images_or_in_a_folder(tmp_path) -> None:
    images = [tmp_path / "a.png", tmp_path / "a.b.png"]
    (tmp_path / "a.txt").write_bytes("\ufeff  a cat,\r\n on a  mât \n".encode())
    (tmp_path / "a.b.txt").write_text("")
    assert resolve_prompts(images, "sidecar") == ["a cat, on a mât", ""]
    (tmp_path / "tag").mkdir()
    (tmp_path / "tag" / "a.txt").write_text("a dog")
    assert resolve_prompts(images, "sidecar") == resolve_prompts(images, "sidecar", tmp_path) == ["a dog", ""]
    assert resolve_prompts([tmp_path / "gt" / "a.png"], "sidecar", tmp_path) == ["a dog"]


def test_prompts_without_files(tmp_path) -> None:
    paths = [tmp_path / f"{name}.png" for name in "abcde"]
    assert resolve_prompts(paths, "adapter") is None
    assert resolve_prompts(paths, "a photo") == ["a photo"] * 5


def test_prompts_that_cannot_be_had(tmp_path) -> None:
    paths = [tmp_path / f"{name}.png" for name in "abcde"]
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    for images, prompts, message in (
        (paths, "sidecar", r"4 of 5 images have no prompt file .*b\.png, c\.png, d\.png, \.\.\."),
        (paths[:1], "sidecar", r"a\.txt.*UTF-8"),
        (paths, "captioner", "set data.captioner"),
    ):
        with pytest.raises(UserError, match=message):
            resolve_prompts(images, prompts)


# ---- finding files of tensors ----


def test_nothing_is_looked_for_without_names_or_images(marked) -> None:
    images = sorted(marked.glob("*.png"))
    assert tensor_files(images, ()) is None
    assert tensor_files([], ("gray",)) is None
    assert opened(marked, names=()).batch(0, [0]).extras == {}


def test_no_file_at_all_leaves_it_to_the_adapter(hq_folder) -> None:
    assert tensor_files(sorted(hq_folder.glob("*.png")), ("gray",), hq_folder) is None
    assert opened(hq_folder).batch(0, [0, 1]).extras == {}


def test_files_lie_beside_the_images_or_in_extras(marked) -> None:
    images = sorted(marked.glob("*.png"))
    beside = tensor_files(images, ("gray",), marked)
    assert beside == [path.with_suffix(".safetensors") for path in images] == tensor_files(images, ("gray",))
    moved(marked)
    inside = [marked / "extras" / path.name for path in beside]
    assert tensor_files(images, ("gray",), marked) == inside == tensor_files(images, ("gray",))
    assert tensor_files([path.parent / "lq" / path.name for path in images], ("gray",), marked) == inside


def test_dots_in_a_name_belong_to_it(tmp_path) -> None:
    save_file({"gray": torch.zeros(1)}, tmp_path / "a.b.safetensors")
    assert tensor_files([tmp_path / "a.b.png"], ("gray",)) == [tmp_path / "a.b.safetensors"]


@pytest.mark.parametrize("where", ["beside", "extras"])
def test_files_of_some_images_only_are_refused_and_named(marked, where) -> None:
    place = marked if where == "beside" else moved(marked) / "extras"
    for index in (1, 4):
        (place / f"{index:03}.safetensors").unlink()
    with pytest.raises(UserError, match=r"2 of 6 images .* \(001\.png, 004\.png\)") as caught:
        opened(marked)
    assert "\n" not in str(caught.value)


# ---- reading them ----


def test_reading(tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"half": torch.ones(2, dtype=torch.bfloat16), "whole": torch.arange(3), "other": torch.zeros(1)}, path)
    found = read_tensors(path, ("half", "whole"))
    assert found.keys() == {"half", "whole"} and all(value.dtype == torch.float32 for value in found.values())
    assert found["whole"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"b": torch.zeros(1)}, "no tensor 'a', only b"),
        ({}, "no tensor 'a', only nothing"),
        ({"a": torch.tensor([1.0, torch.inf])}, "not finite"),
        ({name: torch.zeros(1) for name in "bcdef"}, "only b, c, d, ..."),
    ],
)
def test_a_file_that_lacks_what_is_asked_for(tmp_path, tensors, says) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors") as caught:
        read_tensors(tmp_path / "x.safetensors", ("a",))
    assert says in str(caught.value)


def test_stacking_keeps_the_order_and_refuses_other_shapes(tmp_path) -> None:
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for index, path in enumerate(paths):
        save_file({"a": torch.full((2,), float(index)), "b": torch.full((1, 2), -float(index))}, path)
    stacked = stack_tensors([paths[2], paths[0], paths[2]], ("a", "b"))
    assert stacked["a"].tolist() == [[2, 2], [0, 0], [2, 2]]
    assert stacked["b"].shape == (3, 1, 2) and stacked["b"][0, 0, 0] == -2
    assert stack_tensors([], ("a",)) == {}
    check_tensors(paths, ("a", "b"))
    save_file({"a": torch.zeros(2), "b": torch.zeros(1, 3)}, paths[1])
    for refused in (stack_tensors, check_tensors):
        refused(paths, ("a",))  # what is not asked for may have any shape
        with pytest.raises(UserError, match=r"1\.safetensors.*'b' is \(1, 3\).*0\.safetensors.*\(1, 2\)"):
            refused(paths, ("a", "b"))


# ---- through the data ----


@pytest.mark.parametrize("where", ["beside", "extras"])
def test_rows_follow_their_images_through_epochs_batches_crops_and_flips(marked, where) -> None:
    data = opened(marked if where == "beside" else moved(marked))
    data.check()
    orders = []
    for start in range(0, 4 * COUNT, 4):  # batches that reach over the end of an epoch, too
        indices = list(range(start, start + 4))
        if start % 8:
            data.prefetch(3, [indices])
        batch = data.batch(3, indices)
        assert_rows_fit(batch)
        orders += [Path(path).name for path in batch.paths]
    epochs = [orders[first : first + COUNT] for first in range(0, len(orders), COUNT)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1], "choose another seed: it should shuffle"


@pytest.mark.parametrize("side", [None, 8])
def test_rows_follow_their_images_through_validation(marked, side) -> None:
    batches = list(opened(marked, crop=None).validation(side=side))
    assert [Path(batch.paths[0]).stem for batch in batches] == [f"{index:03}" for index in range(COUNT)]
    for batch in batches:
        assert_rows_fit(batch)


@pytest.mark.parametrize("where", ["beside", "extras"])
def test_pairs_have_theirs_beside_the_targets_or_in_extras(marked, tmp_path, where) -> None:
    pairs = tmp_path / "pairs"
    place = pairs / ("gt" if where == "beside" else "extras")
    for folder in (pairs / "gt", pairs / "lq", place):
        folder.mkdir(parents=True, exist_ok=True)
    for path in marked.glob("*.png"):
        image = read_image(path)
        write_image(image, pairs / "gt" / path.name)
        write_image(image[:, ::4, ::4], pairs / "lq" / path.name)
        shutil.copy(path.with_suffix(".safetensors"), place)
    data = opened(pairs)
    for start in range(0, COUNT, 2):
        assert_rows_fit(data.batch(1, [start, start + 1]))


def test_groups_and_rows_of_a_batch_take_theirs_along(marked) -> None:
    batch = opened(marked).batch(0, [0, 1, 2])
    assert_rows_fit(batch.repeat(3))
    assert_rows_fit(batch.rows(torch.tensor([2, 0])))
    assert torch.equal(batch.repeat(2).extras["gray"][3], batch.extras["gray"][1])


def test_a_damaged_file_is_found_by_the_check(marked) -> None:
    path = marked / "005.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"005\.safetensors' is damaged"):
        opened(marked).check()


# ---- through the commands ----


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two LQ images with embeddings beside them."""
    return write_extras(write_images(tmp_path / "photos", 2, 12), 2)


def results(folder: Path) -> list[torch.Tensor]:
    return [read_image(path) for path in sorted(folder.glob("*.png"))]


def test_upscale_reads_the_file_of_each_image(commands: Commands, tiny_seesr, photos, tmp_path) -> None:
    answer = commands("upscale", photos, "--base", tiny_seesr, *COMMAND, "-o", tmp_path / "one")
    assert answer.code == 0, answer.err
    adapter = load_adapter("seesr", tiny_seesr, steps=2)
    for index, result in enumerate(results(tmp_path / "one")):
        embedding = load_file(photos / f"{index:03}.safetensors")["ram"]
        batch = Batch(read_image(photos / f"{index:03}.png")[None], extras={"ram": embedding[None]})
        expected = upscale_tensor(adapter, batch, generator=Draws(0, 0, [index], "upscale"))[0]
        assert float((result - expected).abs().max()) < 1 / LEVELS
    write_extras(photos, 2, seed=1)
    answer = commands("upscale", photos, "--base", tiny_seesr, *COMMAND, "-o", tmp_path / "other")
    assert answer.code == 0, answer.err
    for before, after in zip(results(tmp_path / "one"), results(tmp_path / "other"), strict=True):
        assert float((before - after).abs().max()) > 2 / LEVELS, "embeddings should matter"


def test_upscale_looks_at_all_files_before_it_begins(refused, tiny_seesr, photos, tmp_path) -> None:
    command = ("upscale", photos, "--base", tiny_seesr, *COMMAND, "-o", tmp_path / "out")
    save_file({"ram": torch.zeros(9, 512)}, photos / "001.safetensors")
    assert "equal shapes" in refused(*command)
    (photos / "001.safetensors").write_bytes(b"")
    assert "damaged" in refused(*command)
    (photos / "001.safetensors").unlink()
    assert "1 of 2 images" in refused(*command)
    (photos / "000.safetensors").unlink()
    assert "'ram'" in refused(*command)
    write_extras(photos, 2, ram=torch.zeros(10, 256))
    assert "(1, tokens, 512)" in refused(*command)


@pytest.mark.parametrize("where", ["beside", "extras"])
def test_evaluate_reads_the_files_of_a_data_folder(commands: Commands, tiny_seesr, tmp_path, where) -> None:
    adapter = load_adapter("seesr", tiny_seesr, steps=2)
    lora.attach(adapter)
    with torch.no_grad():
        for parameter in lora.parameters(adapter).values():
            parameter.add_(0.05)
    lora.save(adapter, tmp_path / "lora")
    data = write_images(tmp_path / "data", 2, 48)
    place = data if where == "beside" else data / "extras"
    scores = []
    for seed in (0, 0, 1):
        write_extras(place, 2, seed)
        command = ("evaluate", data, "--base", tiny_seesr, *COMMAND, "--lora", tmp_path / "lora", "--metrics", "psnr")
        found = tmp_path / f"found-{len(scores)}"
        answer = commands(*command, "-o", found)
        assert answer.code == 0, answer.err
        systems = json.loads((found / "evaluation.json").read_text())["systems"]
        scores.append([metrics["psnr"]["scores"] for metrics in systems.values()])
    assert scores[0] == scores[1]
    assert all(one != other for one, other in zip(scores[0], scores[2], strict=True)) and len(scores[0]) == 2
    for path in place.glob("*.safetensors"):
        path.unlink()
    answer = commands(*command)
    assert answer.code == 2 and "'ram'" in answer.err and answer.err.count("\n") == 1, answer.err
