"""LPIPS: equal to pyiqa's on equal weights, and its weights from files."""

import pytest
import torch
import torchvision
from _lpips import WIDTHS, write_lpips
from safetensors.torch import save_file

from rewardsr import Batch
from rewardsr.errors import UserError
from rewardsr.rewards import build
from rewardsr.rewards.lpips import GROUPS, LAYERS, LPIPS


def write_weights(folder, widths=WIDTHS) -> tuple[str, str]:
    """Random files of the two networks."""
    return tuple(write_lpips(folder, widths).values())


def test_agrees_with_pyiqa_on_equal_weights(tmp_path, monkeypatch) -> None:
    untrained = torchvision.models.vgg16(weights=None)
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights: untrained)  # which pyiqa would download
    files = write_weights(tmp_path, (64, 128, 256, 512, 512))
    ours = LPIPS(*files, "")
    names = {"scaling_layer.shift": ours.shift[None], "scaling_layer.scale": ours.scale[None]}
    for name, value in ours.features.state_dict().items():
        layer = 1 + sum(int(name.split(".")[0]) > last for last in LAYERS)
        names[f"net.slice{layer}.{name}"] = value
    for number in range(len(GROUPS)):
        for name in (f"lin{number}.model.1.weight", f"lins.{number}.model.1.weight"):
            names[name] = getattr(ours, f"head{number}")[None].clone()
    save_file(names, tmp_path / "all.safetensors")
    theirs = build("lpips-vgg", weights=str(tmp_path / "all.safetensors"))
    sr, hq = torch.rand(2, 2, 3, 48, 40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = ours(sr, hq), -theirs(sr, Batch(lq=hq, hq=hq))
    assert found.shape == (2,)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert float(ours(hq, hq).abs().max()) == 0


def test_gradients_reach_the_first_image_alone(tmp_path) -> None:
    distance = LPIPS(*write_weights(tmp_path), "")
    pair = torch.rand(2, 1, 3, 16, 24, generator=torch.Generator().manual_seed(1))
    sr, hq = (image.clone().requires_grad_() for image in pair)
    distance(sr, hq).sum().backward()
    assert sr.grad.any() and hq.grad is None


def test_weights_that_do_not_fit_are_refused(tmp_path, contacted) -> None:
    vgg, heads = write_weights(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    _, wider = write_weights(other, (4, 4, 6, 6, 8))
    with pytest.raises(UserError, match="expected heads lin0 to lin4 for 4, 4, 6, 6, 6 channels"):
        LPIPS(vgg, wider, "")
    with pytest.raises(UserError, match="expected VGG16's 13 convolutions"):
        LPIPS(heads, heads, "")
    with pytest.raises(UserError, match="no weights file"):
        LPIPS(vgg, str(tmp_path / "absent.pth"), "")
    with pytest.raises(UserError, match=r"LPIPS: .* connect once, or leave it out"):
        LPIPS(vgg, None, "leave it out")
    assert not contacted
