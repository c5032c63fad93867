"""Compiled networks: one graph each, the same for policy and reference, and the numbers of uncompiled ones."""

import pytest
import torch
from runs import content

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.options import parse
from rewardsr.testing import tiny_pipeline
from rewardsr.train.compiled import check_one_path, compile_networks, eager
from rewardsr.train.prepare import set_up
from rewardsr.train.recipe import Recipe

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


def make(kind: str, base: str):
    more = {"seesr": {"tagger": "taggers:Means", "steps": 3}, "osediff": {"noise_t": 250}}.get(kind, {"steps": 3})
    adapter = load_adapter(kind, base, dtype=torch.bfloat16, **more)
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


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 cannot trace what diffusers asks of packaging")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checkpointing"), [*((kind, False) for kind in KINDS), ("osediff", True)], ids=lambda value: str(value)
)
def test_one_graph_a_network_the_same_for_policy_and_reference(kind, checkpointing, bases) -> None:
    """In bf16, where another order of rounding would show."""
    adapter = make(kind, bases[kind])
    if checkpointing:
        adapter.enable_gradient_checkpointing()
    compile_networks(adapter, BACKEND)
    torch._dynamo.utils.counters.clear()
    policy, reference, gradient = predictions(adapter)
    assert torch.equal(policy, reference), "of equal weights"
    assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    # The autoencoder's encoder where there is one to call, and the networks: policy and reference share a graph.
    graphs = {"osediff": 2, "sd_upscaler": 1, "seesr": 3, "stablesr": 3}[kind]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    fill(adapter)
    compiled = predictions(adapter)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "other weights are no other graph"
    assert float((compiled[0] - compiled[1]).norm()) > 0
    with eager():
        written = predictions(adapter)
    for one, other in zip(compiled, written, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.03


def test_a_policy_that_differs_from_its_reference_is_refused_before_training(folder, monkeypatch) -> None:
    setup = set_up(parse(Recipe, content(folder, str(folder / "base")), "test"))
    fill(setup.adapter)
    before = {name: value.clone() for name, value in lora.parameters(setup.adapter).items()}
    check_one_path(setup)
    predict = setup.adapter.predict

    def rounded_otherwise(z_t, t, condition):
        return predict(z_t, t, condition) + 1e-6 * bool(lora.active(setup.adapter))

    monkeypatch.setattr(setup.adapter, "predict", rounded_otherwise)
    with pytest.raises(UserError, match=r"differs from the reference by .*set compile=false"):
        check_one_path(setup)
    after = lora.parameters(setup.adapter)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
