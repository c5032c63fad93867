"""Where the weights of pyiqa's metrics come from: caches, a download, or a file; and what happens without."""

import os
import pickle
import shutil
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from skimage.data import astronaut
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.hub import connection
from rewardsr.rewards import build, iqa

pyiqa = pytest.importorskip("pyiqa")

SMALL = {"hidden_size": 24, "mlp_dim": 16, "num_layers": 1, "num_heads": 2}  # a MUSIQ of 0.5 million weights
CHECKPOINT = "musiq_koniq_ckpt-e95806b9.pth"  # what pyiqa calls MUSIQ's file


def photos(size: int = 64) -> Tensor:
    """(3, 3, size, size): one photo, differently lit."""
    crop = torch.from_numpy(astronaut()[60 : 60 + size, 180 : 180 + size].copy()).permute(2, 0, 1).float() / 255
    return torch.stack([crop, 0.6 * crop + 0.1, crop.flip(-1)])


def batch() -> Batch:
    return Batch(lq=torch.zeros(3, 3, 4, 4))


def musiq_state(**options: Any) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return pyiqa.create_metric("musiq", pretrained=False, device="cpu", **options).net.state_dict()


@pytest.fixture(scope="module")
def small_state() -> dict[str, Tensor]:
    return musiq_state(**SMALL)


# ---- caches and downloads ----


@pytest.mark.parametrize(
    ("metric", "file"), [("musiq", CHECKPOINT), ("maniqa", ""), ("clipiqa", "RN50.pt"), ("lpips", "")]
)
def test_offline_is_refused_at_once(metric: str, file: str, offline: Path, capfd: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        build(f"iqa:{metric}")
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert message.startswith(f"metric '{metric}': its weights")
    assert file in message
    assert message.endswith("give options: {weights: PATH}")
    assert "\n" not in message
    assert not [path for path in offline.rglob("*") if path.is_file()]
    assert capfd.readouterr().out == ""


def test_cached_weights_work_offline(offline: Path) -> None:
    torch.save(musiq_state(**SMALL), offline / CHECKPOINT)
    assert build("iqa:musiq", **SMALL)(photos(), batch()).isfinite().all()


class Command:
    """Its pickle makes a folder when it is read by whoever lets it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


@pytest.mark.parametrize(
    ("metric", "file"),
    [
        ("musiq", CHECKPOINT),  # by pyiqa's own reader
        ("brisque", "brisque_svm_weights.pth"),  # by torch.load in a network
        ("arniqa", "checkpoints/resnet50-0676ba61.pth"),  # by torch.hub, for torchvision
    ],
)
def test_what_a_cache_holds_runs_no_code(metric: str, file: str, offline: Path, tmp_path: Path) -> None:
    (offline / file).parent.mkdir(exist_ok=True)
    torch.save({"params": Command(tmp_path / "made")}, offline / file)
    with pytest.raises(UserError, match="holds more than tensors"):
        build(f"iqa:{metric}")
    assert not (tmp_path / "made").exists()
    torch.load(offline / file, weights_only=False)
    assert (tmp_path / "made").exists(), "what would have happened"


@pytest.mark.parametrize("answers", [True, False])
def test_what_is_not_cached_is_fetched(answers: bool, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyiqa.utils.download_util

    torch.save(musiq_state(**SMALL), offline / "server.pth")
    fetched: list[str] = []

    def download(url: str, path: str, **_: Any) -> None:
        if not answers:
            urllib.request.urlopen(url, timeout=1)
        if (
            connection.online() and urllib.request.urlopen is urlopen
        ):  # the first attempt runs with downloads switched off
            fetched.append(url)
            shutil.copy(offline / "server.pth", path)
        else:
            urllib.request.urlopen(url)

    def urlopen(url: str, **_: Any) -> None:
        raise OSError("the server\nis down")

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(connection, "online", lambda timeout=3.0: True)
    monkeypatch.setattr(pyiqa.utils.download_util, "download_url_to_file", download)
    if answers:
        assert build("iqa:musiq", **SMALL)(photos(), batch()).isfinite().all()
        assert len(fetched) == 1
    else:
        with pytest.raises(UserError, match=r"'musiq': .* could not be fetched: OSError: the server is down"):
            build("iqa:musiq")


def test_nothing_stays_changed(offline: Path, small_state: dict[str, Tensor], tmp_path: Path) -> None:
    import huggingface_hub.constants
    import timm

    torch.save(small_state, tmp_path / "musiq.pth")

    def replaced() -> tuple[Any, ...]:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        return urllib.request.urlopen, torch.hub.urlopen, offline, timm.create_model, torch.load

    before = replaced()
    draws = torch.get_rng_state()
    build("iqa:musiq", weights=tmp_path / "musiq.pth", **SMALL)
    with pytest.raises(UserError):
        build("iqa:maniqa")
    assert replaced() == before
    assert torch.equal(torch.get_rng_state(), draws)


# ---- local files ----


def save_bare(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "bare.pth")
    return folder / "bare.pth"


def save_wrapped(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"params": {f"module.{name}": value for name, value in state.items()}, "step": 3}, folder / "wrapped.pt")
    return folder / "wrapped.pt"


def save_safe(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "safe.safetensors")
    return folder / "safe.safetensors"


def test_musiq_from_a_file(offline: Path, tmp_path: Path) -> None:
    options = {"num_layers": 2}  # of 14
    state, images = musiq_state(**options), photos()
    direct = pyiqa.create_metric("musiq", pretrained=False, device="cpu", **options)
    direct.net.load_state_dict(state)
    reward = build("iqa:musiq", weights=save_bare(state, tmp_path), **options)
    scores = reward(images, batch())
    assert torch.allclose(scores, direct(images).reshape(-1), atol=1e-5)
    alone = torch.cat([reward(image[None], batch()) for image in images])
    assert torch.allclose(scores, alone, atol=1e-5)
    assert scores.unique().numel() == 3


@pytest.mark.parametrize("save", [save_bare, save_wrapped, save_safe])
def test_formats_of_files(
    save: Callable[[dict[str, Tensor], Path], Path], small_state: dict[str, Tensor], offline: Path, tmp_path: Path
) -> None:
    reward = build("iqa:musiq", weights=str(save(small_state, tmp_path)), **SMALL)
    for name, value in reward._network.state_dict().items():
        assert torch.equal(value, small_state[name])


def test_gradients_through_a_network(small_state: dict[str, Tensor], offline: Path, tmp_path: Path) -> None:
    reward = build("iqa:musiq", weights=save_bare(small_state, tmp_path), **SMALL)
    sr = photos().requires_grad_()
    scores = reward(sr, batch())
    (gradient,) = torch.autograd.grad(scores[0], sr)
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0
    assert not any(weight.requires_grad for weight in reward._network.parameters())


def test_classes_of_ava(offline: Path, tmp_path: Path) -> None:
    weights = save_bare(musiq_state(num_class=10, **SMALL), tmp_path)
    scores = build("iqa:musiq-ava", weights=weights, **SMALL)(photos(), batch())
    assert ((scores >= 1) & (scores <= 10)).all()


class Harmful:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_run_code_are_refused(offline: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    torch.save({"weight": Harmful(trace)}, tmp_path / "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful(trace)))
    for name in ("torch.pth", "plain.pth"):
        for metric in ("musiq", "clipiqa"):
            with pytest.raises(UserError, match=f"metric '{metric}'.*{name}") as caught:
                build(f"iqa:{metric}", weights=tmp_path / name)
            assert "\n" not in str(caught.value)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["cut.pth", "noise.pth", "noise.safetensors", "empty.pt"])
def test_damaged_files(name: str, small_state: dict[str, Tensor], offline: Path, tmp_path: Path) -> None:
    whole = save_bare(small_state, tmp_path).read_bytes()
    content = {"cut": whole[: len(whole) // 2], "noise": bytes(range(256)) * 8, "empty": b""}[Path(name).stem]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"metric 'musiq': '.*{name}' (is|holds)"):
        build("iqa:musiq", weights=tmp_path / name, **SMALL)


def test_files_that_do_not_fit(small_state: dict[str, Tensor], offline: Path, tmp_path: Path) -> None:
    def refused(state: Any, message: str) -> None:
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(UserError, match=message) as caught:
            build("iqa:musiq", weights=tmp_path / "weights.pth", **SMALL)
        assert "\n" not in str(caught.value)

    rest = {name: value for name, value in small_state.items() if name != "head.bias"}
    refused(rest, r"do not fit: 1 missing \(head.bias")
    refused({**small_state, "extra": torch.zeros(1)}, r"1 unknown \(extra")
    refused({**small_state, "head.bias": torch.zeros(7)}, r"1 of another shape or type \(head.bias")
    refused({**small_state, "head.bias": torch.tensor([float("nan")])}, "not finite, in head.bias")
    refused([torch.zeros(1)], "holds no state dict")
    with pytest.raises(UserError, match="no weights file"):
        build("iqa:musiq", weights=tmp_path / "nothing.pth")
    with pytest.raises(UserError, match="no weights file"):
        build("iqa:musiq", weights=tmp_path)


def tiny_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """MANIQA's ViT at a hundredth of its size; asked for trained weights it would have none to give."""
    import timm
    from timm.models.vision_transformer import VisionTransformer

    def create(name: str, pretrained: bool = False, **_: Any) -> Any:
        assert name == "vit_base_patch8_224"
        assert not pretrained
        return VisionTransformer(img_size=224, patch_size=8, embed_dim=16, depth=10, num_heads=2)

    monkeypatch.setattr(timm, "create_model", create)


def maniqa_state(**options: Any) -> tuple[Any, dict[str, Tensor]]:
    """MANIQA with random weights, as pyiqa builds it, and its state."""
    with torch.random.fork_rng(devices=[]), iqa._without_output(), iqa._untrained_backbones():
        torch.manual_seed(0)
        metric = pyiqa.create_metric("maniqa", pretrained=False, device="cpu", **options)
    with torch.no_grad():
        metric.net.fc_score[3].bias.fill_(0.5)  # random weights put nearly every score below 0, which a ReLU cuts off
    return metric, metric.net.state_dict()


def test_maniqa_from_a_file(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_backbone(monkeypatch)
    options = {"embed_dim": 16, "dim_mlp": 16, "num_tab": 1}
    direct, state = maniqa_state(test_sample=4, **options)
    weights, images = save_bare(state, tmp_path), photos(240)[:2]
    scores = build("iqa:maniqa", weights=weights, crops=4, **options)(images, batch())
    assert torch.allclose(scores, direct(images).reshape(-1), atol=1e-5)
    assert scores[0] != scores[1]
    assert not torch.equal(build("iqa:maniqa", weights=weights, crops=1, **options)(images, batch()), scores)


@pytest.mark.slow
def test_maniqa_at_its_real_size(offline: Path, tmp_path: Path) -> None:
    direct, state = maniqa_state(test_sample=1)
    weights, images = save_safe(state, tmp_path), photos(224)[:1]
    assert torch.allclose(build("iqa:maniqa", weights=weights, crops=1)(images, batch()), direct(images)[0], atol=1e-4)
