"""Named protocols: images are finished and scored as their sources do it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.evaluation import fid
from rewardsr.evaluation.conventions import CONVENTIONS, Convention, find_convention, to_levels


def image(seed: int, side: int = 40) -> torch.Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_levels_by_hand() -> None:
    values = torch.tensor([0.0, 0.4, 0.5, 0.99, 1.0, 254.999, 255.0, 300.0, -3.0]) / 255
    assert (to_levels(values, "round") * 255).round().tolist() == [0, 0, 0, 1, 1, 255, 255, 255, 0]
    assert (to_levels(values, "truncate") * 255).round().tolist() == [0, 0, 0, 0, 1, 254, 255, 255, 0]
    assert torch.equal(to_levels(values, "none"), values)


@pytest.mark.parametrize("fix", ["adain", "wavelet"])
@pytest.mark.parametrize("case", ["astro", "flat_target_gradient_source"])
def test_truncated_colour_fixes_are_the_originals(golden, fix, case) -> None:
    """OSEDiff's colour fix on 8-bit images, to the level; what differs lies within float32's rounding of a level."""
    vectors = golden("colorfix")
    target, source = (vectors[f"{case}.{name}"].permute(2, 0, 1)[None].float() / 255 for name in ("target", "source"))
    finished = replace(CONVENTIONS["osediff"], color_fix=fix, before_fix="none", enlarged="none").finish(target, source)
    theirs = vectors[f"{case}.{fix}"].permute(2, 0, 1)[None].int()
    off = ((finished * 255).round().int() - theirs).abs()
    assert int(off.max()) <= 1 and float((off > 0).float().mean()) < 0.005
    rounded = replace(CONVENTIONS["plain"], color_fix=fix, after_fix="round").finish(target, source)
    darker = float((rounded - finished).mean()) * 255
    assert 0.2 < darker < 0.8 or case == "flat_target_gradient_source", "truncation is half a level darker"


def test_an_output_is_truncated_once_where_no_colours_are_fixed() -> None:
    levels = torch.arange(256).float().reshape(1, 1, 16, 16).expand(1, 3, 16, 16) / 255
    finished = replace(CONVENTIONS["osediff"], color_fix="none").finish(levels + 0.3 / 255, levels)
    assert torch.equal((finished * 255).round(), (levels * 255).round())


@pytest.mark.parametrize("luma", [True, False], ids=["y", "rgb"])
@pytest.mark.parametrize("border", [0, 4])
def test_psnr_and_ssim_are_those_of_pyiqa(luma, border) -> None:
    import pyiqa

    convention = Convention("mine", "a test", {"psnr": {}, "ssim": {}}, luma=luma, crop_border=border)
    sr, hq = to_levels(image(0), "truncate"), to_levels((image(0) + 0.1 * image(1)).clamp(0, 1), "round")
    rewards, of_sets = convention.built()
    assert of_sets is None and all(reward.needs_hq for reward in rewards.values())
    for name, reward in rewards.items():
        options = {"test_y_channel": luma, "color_space": "ycbcr", "crop_border": border}
        theirs = pyiqa.create_metric(name, device="cpu", **options)(sr, hq)
        ours = reward(sr, Batch(sr[..., ::4, ::4], hq))
        assert float(ours) == pytest.approx(float(theirs), abs=2e-4), name
    if border:
        tiny = image(0, 8)
        with pytest.raises(UserError, match="crop_border 4 leaves nothing of an image of 8x8"):
            rewards["psnr"](tiny, Batch(tiny[..., ::4, ::4], tiny))


def test_what_the_papers_set() -> None:
    fixes = {name: (c.before_fix, c.color_fix, c.after_fix) for name, c in CONVENTIONS.items()}
    assert fixes == {
        "plain": ("none", "none", "none"),
        "osediff": ("truncate", "adain", "truncate"),
        "seesr": ("round", "adain", "truncate"),
        "gdpo-sr": ("truncate", "adain", "truncate"),
    }
    assert all(convention.luma and not convention.crop_border for convention in CONVENTIONS.values())
    assert "maniqa-pipal" in CONVENTIONS["osediff"].metrics and "maniqa" in CONVENTIONS["gdpo-sr"].metrics
    changed = replace(CONVENTIONS["osediff"], metrics={"psnr": {}}).to_dict()
    assert changed["changed"] == ["metrics"] and changed["after_fix"] == "truncate"
    with pytest.raises(UserError, match="unknown protocol 'osedif': did you mean 'osediff'"):
        find_convention("osedif")


@pytest.mark.parametrize("name", ["osediff", "seesr", "gdpo-sr"])
def test_missing_weights_are_all_named_before_any_work(name, refused, hq_folder, tmp_path) -> None:
    said = refused("evaluate", hq_folder, "--bicubic", "--protocol", name, "-o", tmp_path / "out")
    assert f"protocol '{name}': metric 'lpips'" in said and "there is no connection" in said
    assert "nor can dists, fid" in said and "nothing has been scored" in said and "--metric-option" in said


def test_options_of_metrics_that_are_not_there() -> None:
    with pytest.raises(UserError, match="options are given for 'musiq', and the metrics are psnr, ssim"):
        CONVENTIONS["plain"].built({"musiq": {"weights": "x"}})


@pytest.fixture
def small_fid(monkeypatch):
    """pyiqa's FID on 16 features of a small network of random weights, in place of Inception and its download."""
    import pyiqa.archs.fid_arch
    import pyiqa.archs.inception

    monkeypatch.setattr(pyiqa.archs.inception, "load_pretrained_network", lambda *_, **__: None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = pyiqa.archs.fid_arch.FID()
        pooled = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network.model = nn.Sequential(nn.Conv2d(3, 16, 7, 4), *pooled)
    monkeypatch.setattr(fid, "_cached_or_fetched", lambda *_: SimpleNamespace(net=network))
    return network


def test_fid_is_pyiqas_on_what_was_evaluated(small_fid, hq_folder, commands, tmp_path) -> None:
    options = ("--images", f"same={hq_folder}", "--bicubic", "--metrics", "psnr,fid", "--device", "cpu")
    answer = commands("evaluate", hq_folder, *options, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["sets"]["same"]["fid"] == pytest.approx(0, abs=1e-3) and content["negated"] == ["fid"]
    pictures = tmp_path / "out" / "pictures"
    theirs = small_fid(
        str(pictures / "bicubic"), str(pictures / "HQ"), device=torch.device("cpu"), num_workers=0, verbose=False
    )
    assert -content["sets"]["bicubic"]["fid"] == pytest.approx(float(theirs), rel=1e-5) != 0
    plain = commands("evaluate", hq_folder, *options)
    assert "[one set: none]" in plain.out and plain.out.splitlines() == answer.out.splitlines()[:-1]
    alone = commands("evaluate", hq_folder, *options, "--limit", 1)
    assert alone.code == 2 and "fid compares sets of images" in alone.err
