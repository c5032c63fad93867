"""What only a GPU shows: a bf16 base under a float32 LoRA, agreement with the CPU, memory. Skipped without CUDA."""

import json
from pathlib import Path

import pytest
import torch

import rewardsr
from rewardsr import Batch, Draws, load_adapter, lora, recipe, training
from rewardsr.lora import FILE_NAME
from rewardsr.rewards import build
from rewardsr.setup import choose_device, set_up
from rewardsr.trainers.gdpo import GDPO, GDPOOptions, preference_logit
from rewardsr.upscaling import upscale_tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def settings(base: Path, data: Path, output: Path, **changed: object) -> dict[str, object]:
    """A short run on CUDA in float32; `changed` overrides."""
    return {
        "base": str(base),
        "adapter_options": {"noise_t": 250},
        "trainer_options": {"group_size": 3, "beta": 100},
        "rewards": [{"name": "psnr"}, {"name": "detail"}],
        "data": {"train": str(data), "crop": 32},
        "output": str(output),
        "steps": 3,
        "device": "cuda",
        "precision": "fp32",
        **changed,
    }


def steps_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _exact_products():
    """Float32 means float32 here: TF32 keeps ten bits, and the CPU has none of it."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.fixture
def adapter(tiny_base):
    """The tiny pipeline on CUDA, its base in bf16."""
    return load_adapter("osediff", str(tiny_base), noise_t=250, device="cuda", dtype=torch.bfloat16)


def batch(count: int = 2, side: int = 8) -> Batch:
    random = torch.Generator().manual_seed(0)
    hq = torch.rand(count, 3, 4 * side, 4 * side, generator=random)
    return Batch(lq=torch.nn.functional.avg_pool2d(hq, 4), hq=hq).to("cuda")


def test_auto_means_cuda_and_bf16() -> None:
    device, dtype = choose_device("auto", "auto")
    assert device.type == "cuda"
    assert dtype == (torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32)


def test_a_fresh_lora_changes_nothing_on_a_bf16_base(adapter) -> None:
    before = upscale_tensor(adapter, batch(), generator=Draws(0, 0, [0, 1]))
    lora.attach(adapter)
    assert all(parameter.dtype == torch.float32 for parameter in lora.parameters(adapter).values())
    assert adapter.unet.conv_in.base_layer.weight.dtype == torch.bfloat16
    assert torch.equal(before, upscale_tensor(adapter, batch(), generator=Draws(0, 0, [0, 1])))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_preference_of_a_fresh_lora_is_exactly_zero(adapter, checkpointing) -> None:
    """Policy and reference must take one numeric path: at beta 5000 a mismatch of rounding alone would be seen."""
    lora.attach(adapter)
    if checkpointing:
        adapter.enable_gradient_checkpointing()
    method = GDPO(adapter, {"psnr": build("psnr")}, {"psnr": 1.0}, GDPOOptions(group_size=3))
    group = method.prepare(batch(), Draws(0, 0, [0, 1], "group"))
    task = method._task(group, Draws(0, 0, [0, 1], "update-0"))
    policy = method._errors(task, 0, 6).reshape(2, 3)
    reference = method._reference_errors(task, 0, 6).reshape(2, 3)
    assert policy.requires_grad and not reference.requires_grad
    assert bool((preference_logit(policy, reference, group.advantages, 5000) == 0).all())
    policy.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora.parameters(adapter).values())


def test_the_text_encoder_leaves_the_device(adapter) -> None:
    adapter.encode(batch())
    assert {parameter.device.type for parameter in adapter._text_encoder.parameters()} == {"cpu"}
    held = torch.cuda.memory_allocated()
    adapter.encode(batch())  # the prompt is known: nothing is moved again
    assert torch.cuda.memory_allocated() <= held + 2**20


def test_three_steps_agree_with_the_cpu(tiny_base, hq_folder, tmp_path) -> None:
    """Equal noise, for it is drawn on the CPU; sums differ in their order."""
    for device in ("cpu", "cuda"):
        rewardsr.finetune(settings(tiny_base, hq_folder, tmp_path / device, device=device))
    for one, other in zip(steps_of(tmp_path / "cpu"), steps_of(tmp_path / "cuda"), strict=True):
        for name in ("reference/psnr", "reference/detail", "group/pixel_std"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-2)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=5e-2)
    one, other = (load_lora_tensors(tmp_path / device) for device in ("cpu", "cuda"))
    moved = torch.cat([one[name].flatten() - initial.flatten() for name, initial in fresh(tiny_base).items()])
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one])
    assert float(apart.norm() / moved.norm()) < 0.1, "where they went, against how far apart they ended"


def load_lora_tensors(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run / FILE_NAME)


def fresh(base: Path) -> dict[str, torch.Tensor]:
    """The LoRA as a run of seed 0 finds it."""
    adapter = load_adapter("osediff", str(base), noise_t=250)
    lora.attach(adapter, 4, 8, seed=0)
    return lora.state_dict(adapter)


def test_the_optimiser_is_fused_and_keeps_float32(tiny_base, hq_folder, tmp_path) -> None:
    content = settings(tiny_base, hq_folder, tmp_path / "run", precision="bf16")
    setup = set_up(recipe.parse(recipe.Recipe, content, "test"))
    optimiser = training.make_optimiser(setup)
    assert optimiser.defaults["fused"]
    metrics, _ = training.step(setup, optimiser, training.State())
    assert metrics["skipped"] == 0
    for parameter in lora.parameters(setup.adapter).values():
        assert parameter.dtype == torch.float32 and parameter.device.type == "cuda"
        assert optimiser.state[parameter]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_where_the_straight_one_does(tiny_base, hq_folder, tmp_path, precision, monkeypatch) -> None:
    """Not bit for bit: some of CUDA's backward kernels add in no fixed order."""
    content = settings(tiny_base, hq_folder, tmp_path / "straight", precision=precision, steps=4, checkpoint_every=2)
    rewardsr.finetune(content)
    stopping = training.step

    def stop_after_two(setup, optimiser, state, stopped):
        metrics, _ = stopping(setup, optimiser, state, stopped)
        return metrics, state.step == 2

    monkeypatch.setattr(training, "step", stop_after_two)
    result = rewardsr.finetune({**content, "output": str(tmp_path / "resumed")})
    assert (result.step, result.finished) == (2, False)
    monkeypatch.setattr(training, "step", stopping)
    result = rewardsr.finetune({**content, "output": str(tmp_path / "resumed")}, resume=True)
    assert result.finished
    assert [line["step"] for line in steps_of(tmp_path / "resumed")] == [1, 2, 3, 4]
    one, other = (load_lora_tensors(tmp_path / name) for name in ("straight", "resumed"))
    moved = torch.cat([one[name].flatten() - initial.flatten() for name, initial in fresh(tiny_base).items()])
    apart = torch.cat([(one[name] - other[name]).flatten() for name in one])
    assert float(apart.norm() / moved.norm()) < (0.02 if precision == "fp32" else 0.2)


def test_micro_batches_need_less_memory_and_give_the_same_gradient(tiny_base) -> None:
    found = {}
    for rows in (None, 2):
        adapter = load_adapter("osediff", str(tiny_base), noise_t=250, device="cuda")
        lora.attach(adapter)
        method = GDPO(adapter, {"psnr": build("psnr")}, {"psnr": 1.0}, GDPOOptions(group_size=6, micro_batch=rows))
        group = method.prepare(batch(1, 64), Draws(0, 0, [0], "group"))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for loss in method.losses(group, Draws(0, 0, [0], "update-0")):
            loss.value.backward()
        gradient = torch.cat([p.grad.flatten() for p in lora.parameters(adapter).values()])
        found[rows] = (gradient.cpu(), torch.cuda.max_memory_allocated() - before)
    (whole, at_once), (chunked, in_pieces) = found[None], found[2]
    assert float((whole - chunked).norm() / whole.norm()) < 1e-3
    assert in_pieces < 0.8 * at_once


def test_a_lora_trained_on_bf16_loads_on_the_cpu(tiny_base, hq_folder, tmp_path) -> None:
    """The base is recognised whatever it was rounded to."""
    rewardsr.finetune(settings(tiny_base, hq_folder, tmp_path / "run", precision="bf16"))
    adapter = load_adapter("osediff", str(tiny_base), noise_t=250)
    rewardsr.load_lora(adapter, tmp_path / "run")
    assert upscale_tensor(adapter, torch.rand(1, 3, 5, 7), generator=Draws(0, 0, [0])).shape == (1, 3, 20, 28)


def test_memory_that_runs_out_names_what_helps(tiny_base, hq_folder, tmp_path, monkeypatch) -> None:
    from rewardsr.errors import TrainingError

    def full(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(GDPO, "prepare", full)
    with pytest.raises(TrainingError, match="micro_batch"):
        rewardsr.finetune(settings(tiny_base, hq_folder, tmp_path / "run"))
