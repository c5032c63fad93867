"""What only a GPU shows: a bf16 base under a float32 LoRA, agreement with the CPU, memory. Skipped without CUDA."""

import json
from pathlib import Path

import pytest
import torch

import rewardsr
from rewardsr import Batch, Draws, load_adapter, lora
from rewardsr.errors import TrainingError
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.options import parse
from rewardsr.pipelines import choose_device
from rewardsr.rewards import build
from rewardsr.run_folder import LORA
from rewardsr.testing import tiny_pipeline
from rewardsr.train import loop
from rewardsr.train import recipe as recipes
from rewardsr.train.memory import choose_micro_batch
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import set_up
from rewardsr.trainers.gdpo import GDPO, GDPOOptions, preference_logit
from rewardsr.trainers.rfsr import RFSR, RFSROptions
from rewardsr.transfer import to_device

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
    task = method.groups.task(group, Draws(0, 0, [0, 1], "update-0"))
    policy = method.groups.errors(task, slice(0, 6)).reshape(2, 3)
    reference = method.groups.reference_errors(task, slice(0, 6)).reshape(2, 3)
    assert policy.requires_grad and not reference.requires_grad
    assert bool((preference_logit(policy, reference, group.advantages, 5000) == 0).all())
    policy.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora.parameters(adapter).values())


def test_the_text_encoder_stays_on_the_device_in_the_precision_of_the_base(adapter) -> None:
    weights = list(adapter._text_encoder.parameters())
    before = {(weight.device.type, weight.dtype, weight.data_ptr()) for weight in weights}
    assert {(kind, dtype) for kind, dtype, _ in before} == {("cuda", torch.bfloat16)}
    adapter.encode(batch())
    assert before == {(weight.device.type, weight.dtype, weight.data_ptr()) for weight in weights}


def test_rows_that_share_their_memory_reach_the_device() -> None:
    shared = torch.rand(1, 3, 4, 4).expand(6, -1, -1, -1)
    assert torch.equal(to_device(shared, "cuda").cpu(), shared)


def test_a_step_that_is_not_finite_leaves_the_weights_alone(tiny_base, hq_folder, tmp_path, monkeypatch) -> None:
    """The fused optimiser is launched before anybody has looked: the device itself holds it back."""
    setup = set_up(parse(recipes.Recipe, settings(tiny_base, hq_folder, tmp_path / "run"), "test"))
    optimiser, state = make_optimiser(setup), loop.State()
    loop.step(setup, optimiser, state)
    before = [value.clone() for value in setup.method.trained_weights().values()]
    losses = GDPO.losses

    def broken(self, group, draws):
        for loss in losses(self, group, draws):
            yield type(loss)(loss.value * torch.nan, loss.metrics, loss.weight)

    monkeypatch.setattr(GDPO, "losses", broken)
    metrics, _ = loop.step(setup, optimiser, state)
    assert metrics["not_finite"].startswith("gradient of unet.") and metrics["skipped"] == 1
    after = setup.method.trained_weights().values()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert {int(entry["step"]) for entry in optimiser.state.values()} == {1}
    monkeypatch.undo()
    loop.step(setup, optimiser, state)
    assert not all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_score_that_is_not_finite_is_named_and_leaves_the_weights_alone(
    tiny_base, hq_folder, tmp_path, monkeypatch
) -> None:
    """It is read when the step has been launched, and so must not have reached anything."""
    setup = set_up(parse(recipes.Recipe, settings(tiny_base, hq_folder, tmp_path / "run"), "test"))
    optimiser, state = make_optimiser(setup), loop.State()
    loop.step(setup, optimiser, state)
    before = [value.clone() for value in setup.method.trained_weights().values()]
    kind = type(setup.method.groups.rewards["detail"])
    score = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, sr, given: score(self, sr, given) * torch.nan)
    with pytest.raises(TrainingError, match="reward 'detail' gave a score that is not finite"):
        loop.step(setup, optimiser, state)
    after = setup.method.trained_weights().values()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True)) and state.updates == 1


def test_rows_that_fit_are_found_and_halved_where_they_do_not(tiny_base, hq_folder, tmp_path, monkeypatch) -> None:
    free = torch.cuda.mem_get_info
    content = settings(tiny_base, hq_folder, tmp_path / "run", trainer_options={"group_size": 6, "beta": 100})
    setup = set_up(parse(recipes.Recipe, content, "test"))
    state = loop.State()
    choose_micro_batch(setup, state)
    assert state.micro_batch == 6 and setup.method.micro_batch is None
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, free(device)[1]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    tight = loop.State()
    choose_micro_batch(setup, tight)
    assert tight.micro_batch == setup.method.micro_batch == 1


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

    return load_file(run / LORA)


def fresh(base: Path) -> dict[str, torch.Tensor]:
    """The LoRA as a run of seed 0 finds it."""
    adapter = load_adapter("osediff", str(base), noise_t=250)
    lora.attach(adapter, 4, 8, seed=0)
    return lora.state_dict(adapter)


def test_the_optimiser_is_fused_and_keeps_float32(tiny_base, hq_folder, tmp_path) -> None:
    content = settings(tiny_base, hq_folder, tmp_path / "run", precision="bf16")
    setup = set_up(parse(recipes.Recipe, content, "test"))
    optimiser = make_optimiser(setup)
    assert optimiser.defaults["fused"]
    metrics, _ = loop.step(setup, optimiser, loop.State())
    assert metrics["skipped"] == 0
    for parameter in lora.parameters(setup.adapter).values():
        assert parameter.dtype == torch.float32 and parameter.device.type == "cuda"
        assert optimiser.state[parameter]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_where_the_straight_one_does(tiny_base, hq_folder, tmp_path, precision, monkeypatch) -> None:
    """Not bit for bit: some of CUDA's backward kernels add in no fixed order."""
    content = settings(tiny_base, hq_folder, tmp_path / "straight", precision=precision, steps=4, checkpoint_every=2)
    rewardsr.finetune(content)
    stopping = loop.step

    def stop_after_two(setup, optimiser, state, stopped):
        metrics, _ = stopping(setup, optimiser, state, stopped)
        return metrics, state.step == 2

    monkeypatch.setattr(loop, "step", stop_after_two)
    result = rewardsr.finetune({**content, "output": str(tmp_path / "resumed")})
    assert (result.step, result.finished) == (2, False)
    monkeypatch.setattr(loop, "step", stopping)
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
    def full(*_: object) -> None:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")

    monkeypatch.setattr(GDPO, "prepare", full)
    with pytest.raises(TrainingError, match="micro_batch"):
        rewardsr.finetune(settings(tiny_base, hq_folder, tmp_path / "run"))


# ---- several steps, and gradients through the decoder ----

KINDS = ("sd_upscaler", "seesr", "stablesr")


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("upscaler"), family="upscaler")


@pytest.fixture(scope="module")
def stablesr(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("stablesr"), family="stablesr")


@pytest.fixture
def rfsr(upscaler, stablesr, tiny_seesr, data):
    """The method on a tiny sampler of three steps, every term at every step; a `trained` LoRA differs from a fresh."""

    pipelines = {
        "seesr": (tiny_seesr, {"tagger": "taggers:Means", "guidance": 2.0}),
        "sd_upscaler": (upscaler, {"guidance": 2.0}),
        "stablesr": (stablesr, {}),
    }

    def make(kind: str, device: str, dtype: torch.dtype, trained: bool = False, **options: object) -> RFSR:
        base, more = pipelines[kind]
        made = load_adapter(kind, base, device=device, dtype=dtype, steps=3, **more)
        lora.attach(made)
        if trained:
            random = torch.Generator().manual_seed(3)  # on the CPU, so that every device gets the same
            with torch.no_grad():
                for parameter in lora.parameters(made).values():
                    parameter.add_((0.02 * torch.randn(parameter.shape, generator=random)).to(device))
        always = dict.fromkeys(("structure_window", "reward_window", "kl_window"), (0, 2))
        vgg = str(data / "vgg19_narrow.safetensors")
        chosen = {"vgg": vgg, "structure_weight": 1.0, "kl_weight": 1.0, "text_dropout": 0.0, **always, **options}
        return RFSR(made, {"detail": build("detail")}, {"detail": 1.0}, RFSROptions(**chosen))

    return make


def terms(method: RFSR, given: Batch) -> tuple[dict[str, float], torch.Tensor]:
    """What one update logs, and its gradient."""
    rows = range(len(given))
    group = method.prepare(given, Draws(0, 1, rows, "group"))
    (loss,) = method.losses(group, Draws(0, 1, rows, "update-0"))
    loss.value.backward()
    metrics = {name: float(value) for name, value in loss.metrics.items()}
    return metrics, torch.cat([p.grad.flatten().cpu() for p in lora.parameters(method.adapter).values()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_lora_has_no_style_distance_on_a_bf16_base(kind, checkpointing, rfsr) -> None:
    """As with the preference: policy and reference take one numeric path, whatever it rounds."""
    method = rfsr(kind, "cuda", torch.bfloat16)
    if checkpointing:
        assert method.adapter.enable_gradient_checkpointing() == []
    found, gradient = terms(method, batch())
    assert found["loss/kl"] == 0 and found["loss/structure"] > 0 and found["loss/detail"] > 0
    assert bool(gradient.isfinite().all()) and float(gradient.norm()) > 0
    own = lora.parameters(method.adapter)
    assert {(p.dtype, p.device.type) for p in own.values()} == {(torch.float32, "cuda")}
    frozen = [p for n, p in method.adapter.unet.named_parameters() if ".rewardsr." not in n]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("kind", KINDS)
def test_the_terms_of_rfsr_agree_with_the_cpu(kind, rfsr) -> None:
    found, gradients = {}, {}
    for device in ("cpu", "cuda"):
        method = rfsr(kind, device, torch.float32, trained=True)
        found[device], gradients[device] = terms(method, batch().to(device))
    assert found["cpu"].keys() == found["cuda"].keys() >= {"loss", "loss/structure", "loss/detail", "loss/kl"}
    for name, value in found["cpu"].items():
        assert value > 0 and found["cuda"][name] == pytest.approx(value, rel=1e-4), name
    apart = gradients["cpu"] - gradients["cuda"]
    assert float(apart.norm() / gradients["cpu"].norm()) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_needs_less_memory_and_gives_the_same_gradient(kind, rfsr) -> None:
    gradients, peaks = [], []
    for checkpointing in (False, True):
        method = rfsr(kind, "cuda", torch.float32, trained=True, kl_weight=0.0)
        if checkpointing:
            assert method.adapter.enable_gradient_checkpointing() == []
        terms(method, batch(2, 32))  # what is allocated once, and chosen by trial, is then there
        for parameter in lora.parameters(method.adapter).values():
            parameter.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients.append(terms(method, batch(2, 32))[1])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-3
    assert peaks[1] < peaks[0]


def test_a_live_pipeline_on_cuda_stays_there(upscaler) -> None:
    from diffusers import StableDiffusionUpscalePipeline

    pipe = StableDiffusionUpscalePipeline.from_pretrained(upscaler, local_files_only=True)
    pipe.to("cuda", torch.bfloat16)
    networks = (pipe.unet, pipe.vae, pipe.text_encoder)
    adapter = rewardsr.wrap(pipe, steps=3, guidance=2.0)
    assert (adapter.device.type, adapter.dtype) == ("cuda", torch.bfloat16)
    before = upscale_tensor(adapter, batch(), generator=Draws(0, 0, [0, 1]))
    for network in networks:
        assert {(p.device.type, p.dtype) for p in network.parameters()} == {("cuda", torch.bfloat16)}
    lora.attach(adapter)
    assert {(p.device.type, p.dtype) for p in lora.parameters(adapter).values()} == {("cuda", torch.float32)}
    assert torch.equal(before, upscale_tensor(adapter, batch(), generator=Draws(0, 0, [0, 1])))
