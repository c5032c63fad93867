"""Compiled networks: one graph each, the same for policy and reference, and the numbers of uncompiled ones."""

import pytest
import torch

from rewardsr import Batch, Draws, load_adapter, lora
from rewardsr.testing import tiny_pipeline
from rewardsr.train.compiled import compile_networks

KINDS = ("osediff", "sd_upscaler", "seesr", "stablesr")
# Traces as the default does (a break in the graph is an error), and differentiates, without making code for the CPU.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_seesr) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    made = {"osediff": "sd", "sd_upscaler": "upscaler", "stablesr": "stablesr"}
    return {kind: str(tiny_pipeline(folder / kind, family=family)) for kind, family in made.items()} | {
        "seesr": tiny_seesr
    }


def make(kind: str, base: str, dtype: torch.dtype = torch.float32):
    more = {"seesr": {"tagger": "taggers:Means", "steps": 3}, "osediff": {"noise_t": 250}}.get(kind, {"steps": 3})
    adapter = load_adapter(kind, base, dtype=dtype, **more)
    lora.attach(adapter)
    return adapter


def fill(adapter) -> None:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lora.parameters(adapter).values():
            parameter.copy_(0.03 * torch.randn(parameter.shape, generator=random))


def predictions(adapter) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the policy and of the reference, and the policy's gradient."""
    own = lora.parameters(adapter)
    for parameter in own.values():
        parameter.grad = None
    with torch.no_grad():
        lq = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        condition = adapter.encode(Batch(lq=lq), generator=Draws(0, 0, [0, 1]))
        z_t = adapter.start(condition, Draws(0, 1, [0, 1]))
    with lora.reference(adapter):
        reference = adapter.predict(z_t, adapter.net_t, condition).detach()
    policy = adapter.predict(z_t, adapter.net_t, condition)
    policy.square().sum().backward()
    return policy.detach(), reference, torch.cat([parameter.grad.flatten() for parameter in own.values()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_a_network_and_the_same_numbers(kind, checkpointing, bases) -> None:
    adapter = make(kind, bases[kind])
    if checkpointing:
        adapter.enable_gradient_checkpointing()
    fill(adapter)
    expected = predictions(adapter)
    compile_networks(adapter, BACKEND)
    torch._dynamo.utils.counters.clear()
    found = predictions(adapter)
    assert not torch._dynamo.utils.counters["graph_break"]
    calls = {"osediff": 2, "sd_upscaler": 1, "seesr": 3, "stablesr": 3}[kind]
    # The autoencoder's encoder where there is one to call, and the networks: policy and reference share a graph.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == calls
    for one, other in zip(expected, found, strict=True):
        assert float((one - other).norm() / one.norm()) < 1e-5
    with torch.no_grad():
        image = adapter.to_image(torch.zeros(1, 4, 8, 8))
    assert bool(image.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_lora_is_the_reference_bit_for_bit_in_bf16(kind, bases) -> None:
    adapter = make(kind, bases[kind], torch.bfloat16)
    compile_networks(adapter, BACKEND)
    policy, reference, gradient = predictions(adapter)
    assert torch.equal(policy, reference)
    assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0
