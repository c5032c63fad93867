"""The fake device sees what it is there for: planted copies, reads and tensors, memory to the byte, and mix-ups."""

import pytest
import torch
import torch.nn.functional as F
from _fake import fake_cuda
from _records import ROOT
from _tensors import MixUpError
from torch.utils.checkpoint import checkpoint

MIB = 2**20


@pytest.fixture
def device():
    with fake_cuda() as device:
        yield device


def planted(expression: str):
    """A function of x that stands in a file of the package."""
    made: dict[str, object] = {"torch": torch, "F": F}
    exec(compile(f"def run(x):\n    return {expression}", str(ROOT / "rewardsr" / "planted.py"), "exec"), made)
    return made["run"]


@pytest.mark.parametrize(
    ("expression", "kind", "size", "pinned", "waits"),
    [
        ("x.sum().item()", "read", 4, False, True),
        ("float(x.mean())", "read", 4, False, True),
        ("bool((x > 0).all())", "read", 1, False, True),
        ("x.tolist()", "D2H", 1024, False, True),
        ("x.cpu()", "D2H", 1024, False, True),
        ("x.to('cpu', non_blocking=True)", "D2H", 1024, True, False),
        ("torch.zeros(256).copy_(x)", "D2H", 1024, False, True),
        ("(x > 0).nonzero()", "shape", 8, False, True),
        ("x[x > 0]", "shape", 8, False, True),
        ("x[torch.tensor([0, 1])]", "H2D", 16, False, True),
        ("torch.zeros(256).to('cuda')", "H2D", 1024, False, True),
        ("torch.zeros(256).to('cuda', torch.bfloat16)", "H2D", 512, False, True),
        ("torch.zeros(256).to('cuda', non_blocking=True)", "H2D", 1024, False, False),
        ("torch.zeros(256).pin_memory().to('cuda', non_blocking=True)", "H2D", 1024, True, False),
        ("torch.empty(256, pin_memory=True)[:4].to('cuda')", "H2D", 16, True, True),
        ("torch.tensor([1.0, 2.0], device='cuda')", "H2D", 8, False, True),
        ("x.copy_(torch.zeros(256))", "H2D", 1024, False, True),
        ("torch.cuda.synchronize()", "wait", 0, False, True),
    ],
)
def test_what_travels_or_waits_is_seen_with_its_line(device, expression, kind, size, pinned, waits) -> None:
    x = torch.randn(256, device="cuda")
    with device.part("here"):
        planted(expression)(x)
    (event,) = device.events
    assert (event.kind, event.bytes, event.pinned, event.waits) == (kind, size, pinned, waits)
    assert (event.site, event.part) == ("rewardsr/planted.py:2", "here")


@pytest.mark.parametrize(
    "expression",
    [
        "x * 2.0 + torch.tensor(2.0)",
        "x.to('cuda')",
        "x.to('cuda', torch.bfloat16)",
        "torch.full_like(x, 3.0)",
        "torch.zeros(3, device='cuda')",
        "x[torch.arange(3, device='cuda')]",
        "torch.where(x > 0, x, 0.0).sum()",
        "torch.zeros(3).sum().item()",
    ],
)
def test_what_stays_on_one_side_is_no_event(device, expression) -> None:
    planted(expression)(torch.randn(256, device="cuda"))
    assert device.events == []


@pytest.mark.parametrize(
    "expression",
    [
        "x + torch.zeros(256)",
        "x.add_(torch.zeros(256))",
        "torch.stack([x, torch.zeros(256)])",
        "torch.where(torch.zeros(256) > 0, x, x)",
        "F.linear(x, torch.zeros(8, 256))",
        "x.index_select(0, torch.tensor([1]))",
        "x.requires_grad_().sin().backward(torch.zeros(256))",
    ],
)
def test_tensors_of_both_sides_in_one_operation_fail(device, expression) -> None:
    with pytest.raises(RuntimeError) as raised:
        planted(expression)(torch.randn(256, device="cuda"))
    if isinstance(raised.value, MixUpError):
        assert "rewardsr/planted.py:2" in str(raised.value)


def test_memory_is_exact(device) -> None:
    a = torch.zeros(512, 512, device="cuda")
    assert device.allocated == MIB
    b = (a @ a).relu().view(-1)  # the product is gone when the sequence ends
    assert (device.allocated, device.total.peak) == (2 * MIB, 3 * MIB)
    del a
    assert device.allocated == MIB
    device.reset()
    with device.part("more"):
        torch.zeros(1, dtype=torch.uint8, device="cuda")  # the allocator has no smaller piece than this
    assert (device.allocated, device.total.peak, device.costs["more"].peak) == (MIB, MIB + 512, MIB + 512)
    del b
    assert device.allocated == 0


def test_what_is_kept_for_gradients_is_there_until_they_are_made(device) -> None:
    weight = torch.zeros(512, 512, device="cuda", requires_grad=True)
    loss = weight.exp().sin().cos().sum()  # exp keeps its result, which sin keeps as well, and cos keeps what it got
    assert device.allocated == 3 * MIB + 512
    loss.backward()
    del loss
    assert device.allocated == 2 * MIB, "the weight and its gradient"

    def layers(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = x.sin()
        return x

    def peak(run) -> int:
        device.reset()
        run(weight).sum().backward()
        return device.total.peak

    whole = peak(layers)
    pieces = peak(lambda x: checkpoint(layers, checkpoint(layers, x, use_reentrant=False), use_reentrant=False))
    assert whole == (2 + 8 + 1) * MIB + 2 * 512, "weight and gradient, eight kept, the last; a sum and its gradient"
    assert pieces < whole + 2 * MIB, "16 layers take hardly more than 8, since only half of them are kept at once"


def test_attention_keeps_no_square_matrix(device) -> None:
    query = torch.randn(1, 1, 8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    F.scaled_dot_product_attention(query, query, query).sum().backward()
    square = 8192 * 8192 * 2
    assert device.total.peak < square / 10
    assert device.total.flops == 3.5 * 4 * 8192 * 8192 * 64, "two products, and five backward"


def test_layouts_are_those_of_cuda(device) -> None:
    """cuDNN takes channels last where the weights are; group norm takes and gives contiguous images."""
    convolution = torch.nn.Conv2d(8, 8, 3, padding=1, device="cuda").to(memory_format=torch.channels_last)
    image = torch.zeros(1, 8, 64, 64, device="cuda")
    norm = torch.nn.GroupNorm(2, 8, device="cuda")
    with torch.no_grad():
        result = convolution(image)
        assert result.is_contiguous(memory_format=torch.channels_last)
        size = image.numel() * 4
        before = device.allocated
        device.reset()
        result = norm(result)
        assert result.is_contiguous()
        statistics = 2 * 512
        assert device.total.peak == before + 2 * size + statistics, "the result, and a contiguous copy while it is made"


def test_kernels_operations_and_traffic_are_counted(device) -> None:
    a, b = torch.zeros(64, 32, device="cuda"), torch.zeros(32, 16, device="cuda")
    device.reset()
    (a @ b).t()[0].view(4, 16).expand(8, 4, 16)
    cost = device.total
    assert (cost.kernels, cost.flops) == (1, 2 * 64 * 32 * 16)
    assert cost.bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert cost.seconds == 2e-6, "the least that a kernel takes"


def test_small_values_that_are_known_decide(device) -> None:
    places = torch.tensor([1, 2, 3]).to("cuda")
    assert (places > 1).nonzero().tolist() == [[1], [2]]
    assert places[places > 1].sum().item() == 5
    places.clamp_(max=2)
    assert places.tolist() == [1, 2, 2]
    assert (torch.arange(4, device="cuda") == 3).nonzero().item() == 3
    places.copy_(torch.randn(3, device="cuda"))
    assert len((places > 1).nonzero()) == 3, "values that nobody knows are taken for true"
    x = torch.randn(5, device="cuda")
    assert bool(x.isfinite().all()) and not bool(x.isnan().any())
    assert 0 <= x.sum().item() < 1


def test_autocast_casts_as_on_cuda(device) -> None:
    layer, norm = torch.nn.Linear(8, 8, device="cuda"), torch.nn.GroupNorm(2, 8, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4, 8, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        once = layer(x)
        device.reset()
        result = norm(layer(once))
        assert device.total.kernels == 5, (
            "a product, casts of image, scale and shift, a norm; the weight is cast before"
        )
        with torch.autocast("cuda", enabled=False):
            assert layer(x).dtype == torch.float32
    assert (once.dtype, result.dtype) == (torch.bfloat16, torch.float32)
    result.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
