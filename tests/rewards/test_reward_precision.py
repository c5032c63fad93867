"""In which precision rewards compute, and that nothing of it stays behind."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _imagereward import imagereward
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards import build, distances, iqa
from rewardsr.rewards import imagereward as imagereward_module
from rewardsr.rewards import perceptual as perceptual_module
from rewardsr.rewards.precision import chosen, computing

pytest.importorskip("pyiqa")
if not hasattr(torch.backends.cudnn, "conv"):
    pytest.skip("tells what is computed in by switches of torch 2.9", allow_module_level=True)

SMALL = {"hidden_size": 24, "mlp_dim": 16, "num_layers": 1, "num_heads": 2}  # a MUSIQ of 0.5 million weights
SWITCHES = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def tf32() -> tuple[bool, ...]:
    """Whether products and convolutions are done in TF32."""
    return tuple(switch.fp32_precision == "tf32" for switch in SWITCHES[:2])


@pytest.fixture(params=["highest", "high", "medium", "untouched", "mixed"])
def everywhere(request: pytest.FixtureRequest) -> Iterator[None]:
    """TF32 as a caller might have it for all of torch; it must still be so afterwards."""
    start = [switch.fp32_precision for switch in SWITCHES]
    if request.param in ("highest", "high", "medium"):
        torch.set_float32_matmul_precision(request.param)
        torch.backends.cudnn.allow_tf32 = request.param != "highest"
    elif request.param == "mixed":  # the older switches cannot even be read beside these
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = "tf32", "ieee"
    before = tf32()
    yield
    assert tf32() == before
    if request.param != "mixed":
        assert torch.get_float32_matmul_precision() == request.param.replace("untouched", "highest")
        assert torch.backends.cudnn.allow_tf32 == (request.param != "highest")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for switch, value in zip(SWITCHES, start, strict=True):
        switch.fp32_precision = value


class Products(TorchDispatchMode):
    """What the switches say, and in which type it is done, whenever something is multiplied or convolved."""

    names = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product", "linear")

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[tuple[bool, ...], torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.startswith(self.names):
            self.seen.add((tf32(), args[0].dtype))
        return func(*args, **(kwargs or {}))


def images(side: int = 64) -> tuple[Tensor, Batch]:
    hq = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    return (0.9 * hq).clone(), Batch(lq=hq[..., ::4, ::4], hq=hq, prompts=("a cat", "a dog"))


@pytest.fixture
def musiq(tmp_path: Path) -> Path:
    import pyiqa

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(
            pyiqa.create_metric("musiq", pretrained=False, device="cpu", **SMALL).net.state_dict(), tmp_path / "m.pth"
        )
    return tmp_path / "m.pth"


@pytest.mark.parametrize(("precision", "inside"), [("fp32", False), ("tf32", True), ("bf16", True)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.filterwarnings("ignore:.*Disabling")
def test_switches_are_set_inside_and_put_back(precision: Any, inside: bool, device: str, everywhere: None) -> None:
    before = tf32()
    for error in (contextlib.nullcontext(), pytest.raises(KeyError)):
        with error, computing(torch.device(device), precision):
            assert tf32() == (inside and device == "cuda",) * 2
            assert torch.backends.cudnn.deterministic and torch.backends.cudnn.enabled
            if isinstance(error, contextlib.nullcontext):
                assert torch.is_autocast_enabled("cpu") == (precision == "bf16" and device == "cpu")
            else:
                raise KeyError
        assert tf32() == before
    assert not torch.backends.cudnn.deterministic


@pytest.mark.parametrize(
    "name", ["ssim", "detail", "detail_correlation", "sharpness", "iqa:ssim", "iqa:gmsd", "iqa:nlpd", "iqa:vif"]
)
def test_formulas_are_exact(name: str, everywhere: None) -> None:
    """pyiqa's own wrapper would convolve in TF32 whatever is set around it."""
    sr, batch = images()
    reward = build(name)
    expected = reward(sr, batch)
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        assert torch.equal(reward(sr, batch), expected)
    assert products.seen and all(
        switches == (False, False) and dtype in (torch.float32, torch.float64) for switches, dtype in products.seen
    )


def test_style_distance_is_exact(everywhere: None) -> None:
    features = {layer: torch.rand(2, 4, 8, 8) for layer in distances.STYLE_WEIGHTS}
    with torch.autocast("cpu", torch.bfloat16), Products() as products:
        distances.style_distance(features, features)
    assert products.seen == {((False, False), torch.float32)}


@pytest.mark.parametrize(
    ("precision", "used"), [("auto", "tf32"), ("fp32", "fp32"), ("tf32", "tf32"), ("bf16", "bf16")]
)
def test_networks_compute_as_they_are_told(
    precision: str, used: str, musiq: Path, weights: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def spy(device: torch.device, precision: Any = "fp32") -> Any:
        asked.append((device.type, precision))
        return computing(device, precision)

    for module in (iqa, imagereward_module, perceptual_module):
        monkeypatch.setattr(module, "computing", spy)
    for make in (
        lambda precision: build("iqa:musiq", weights=musiq, precision=precision, **SMALL),
        lambda precision: imagereward(weights, vocabulary, precision=precision),
        lambda precision: build("perceptual", precision=precision),
    ):
        reward, exact, (sr, batch) = make(precision), make("fp32"), images()
        expected = exact(sr, batch)
        asked.clear()
        sr.requires_grad_()
        with Products() as products:
            scores = reward(sr, batch)
        assert asked[-1] == ("cpu", used)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, expected) == (used != "bf16")
        assert torch.allclose(scores, expected, rtol=0.05, atol=0.02)
        assert (torch.bfloat16 in {dtype for _, dtype in products.seen}) == (used == "bf16")
        (gradient,) = torch.autograd.grad(scores.sum(), sr)
        assert gradient.isfinite().all() and gradient.any()


def test_formulas_have_no_other_precision() -> None:
    assert chosen("x", torch.nn.Linear(98, 101), "auto") == "fp32"
    assert chosen("x", torch.nn.Linear(99, 100), "auto") == "tf32"
    for metric in ("ssim", "nlpd"):
        with pytest.raises(UserError, match=f"metric '{metric}' is a formula, .* drop the option 'precision'"):
            build(f"iqa:{metric}", precision="bf16")
        build(f"iqa:{metric}", precision="fp32")
    with pytest.raises(UserError, match="'precision' is 'fp16'"):
        build("iqa:ssim", precision="fp16")
