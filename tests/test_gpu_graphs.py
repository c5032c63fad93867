"""Network calls recorded as CUDA graphs, on a card: they give what the calls give. Skipped without CUDA."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rewardsr
from rewardsr import Batch, Draws, load_adapter, lora
from rewardsr.run_folder import LORA
from rewardsr.train.graphs import use_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = ("osediff", "sd_upscaler", "seesr", "stablesr")


def make(kind: str, base: str):
    more = {"seesr": {"tagger": "taggers:Means", "steps": 3}, "osediff": {"noise_t": 250}}.get(kind, {"steps": 3})
    adapter = load_adapter(kind, base, device="cuda", dtype=torch.bfloat16, **more)
    lora.attach(adapter)
    return adapter, list(lora.parameters(adapter).values())


def move(weights, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight.copy_(0.03 * torch.randn(weight.shape, generator=random))


def given(adapter, seed: int):
    lq = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        condition = adapter.encode(Batch(lq=lq).to("cuda"), generator=Draws(seed, 0, [0, 1]))
        return adapter.start(condition, Draws(seed, 1, [0, 1])), adapter.net_t, condition


def outcome(adapter, weights, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reference with and without gradients, policy, and the policy's gradient."""
    inputs = given(adapter, seed)
    for weight in weights:
        weight.grad = None
    with lora.reference(adapter):
        reference = adapter.predict(*inputs)
        with torch.no_grad():
            sampled = adapter.predict(*inputs)
    policy = adapter.predict(*inputs)
    policy.square().sum().backward()
    return reference, sampled, policy.detach(), torch.cat([weight.grad.flatten() for weight in weights])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_replays_give_what_calls_give(kind, checkpointing, bases) -> None:
    adapter, weights = make(kind, bases[kind])
    if checkpointing:
        adapter.enable_gradient_checkpointing()
    for seed in range(4):
        move(weights, seed)
        adapter.network_call = None
        written = outcome(adapter, weights, seed)
        if seed == 0:
            use_graphs(adapter, weights)
            graphs = adapter.network_call
        adapter.network_call = graphs
        recorded = outcome(adapter, weights, seed)
        for one, other in zip(recorded[:3], written[:3], strict=True):
            assert torch.equal(one, other)
        # Some of CUDA's backward kernels add in no fixed order.
        assert float((recorded[3] - written[3]).norm() / written[3].norm()) < 1e-2
        assert not torch.equal(recorded[0], recorded[2])


def test_a_fresh_lora_has_no_preference_with_graphs(bases) -> None:
    adapter, weights = make("osediff", bases["osediff"])
    use_graphs(adapter, weights)
    for seed in range(3):
        reference, _, policy, gradient = outcome(adapter, weights, seed)
        assert torch.equal(reference, policy) and float(gradient.norm()) > 0


def settings(bases: dict[str, str], data: Path, output: Path, **changed: object) -> dict[str, object]:
    """A short run in float32."""
    return {
        "base": bases["osediff"],
        "adapter_options": {"noise_t": 250},
        "trainer_options": {"group_size": 3, "beta": 100},
        "rewards": [{"name": "psnr"}, {"name": "detail"}],
        "data": {"train": str(data), "validation": str(data), "validation_limit": 2, "crop": 32},
        "output": str(output),
        "device": "cuda",
        "precision": "fp32",
        **changed,
    }


def test_a_run_with_graphs_is_the_run_without(bases, hq_folder, tmp_path: Path) -> None:
    found = {}
    for graphs in (False, True):
        run = tmp_path / str(graphs)
        rewardsr.finetune(settings(bases, hq_folder, run, steps=5, accumulate=2, validate_every=2, cuda_graphs=graphs))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found[graphs] = [line for line in lines if "loss" in line], load_file(run / LORA)
    (written, plain), (recorded, replayed) = found[False], found[True]
    for one, other in zip(recorded, written, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)
    moved = torch.cat([plain[name].flatten() for name in plain if ".lora_B." in name])
    apart = torch.cat([(plain[name] - replayed[name]).flatten() for name in plain if ".lora_B." in name])
    assert float(apart.norm() / moved.norm()) < 0.05


def test_a_dry_run_counts_what_graphs_keep(bases, hq_folder, tmp_path: Path) -> None:
    peaks = {}
    for graphs in (False, True):
        found = rewardsr.finetune(
            settings(bases, hq_folder, tmp_path / "run", steps=5, cuda_graphs=graphs), dry_run=True
        )
        peaks[graphs] = found.peak_gib
    assert peaks[True] > peaks[False] and not (tmp_path / "run").exists()
