"""Our LoRA: it starts as nothing, comes back bit for bit, loads where people work, and refuses what does not fit."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewardsr import Batch, load_adapter, lora, run_folder
from rewardsr.draws import Draws
from rewardsr.errors import UserError
from rewardsr.lora.fingerprint import same_base
from rewardsr.testing import tiny_pipeline

NOISE = {"noise_t": 250, "net_t": 100, "scale": 1}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    """Two tiny pipelines of one shape and other weights, and copies of the first in half precisions."""
    folder = tmp_path_factory.mktemp("bases")
    made = {"own": tiny_pipeline(folder / "own"), "other": tiny_pipeline(folder / "other", seed=1)}
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        made[name] = folder / name
        shutil.copytree(made["own"], made[name])
        for part in ("unet", "vae"):
            tensors = load_file(made["own"] / part / "diffusion_pytorch_model.safetensors")
            halves = {key: value.to(dtype) for key, value in tensors.items()}
            save_file(halves, made[name] / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return {name: str(path) for name, path in made.items()}


def filled(adapter, rank: int = 4, alpha: float = 8, seed: int = 3, size: float = 0.1):
    """The adapter with a LoRA as after training: no matrix is zero."""
    lora.attach(adapter, rank, alpha)
    random = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters(adapter).values():
        parameter.data = size * torch.randn(parameter.shape, generator=random)
    return adapter


@torch.no_grad()
def prediction(adapter, images: int = 1) -> torch.Tensor:
    lq = torch.rand(images, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = adapter.encode(Batch(lq=lq, prompts=("a cat",) * images))
    return adapter.predict(adapter.start(condition, Draws(0, 0, range(images))), 100, condition)


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory) -> tuple[str, torch.Tensor]:
    """A LoRA of the first base in a file (rank 2, alpha 3), and what the pipeline predicts with it."""
    adapter = filled(load_adapter("osediff", bases["own"], **NOISE), 2, 3)
    return str(lora.save(adapter, tmp_path_factory.mktemp("run"))), prediction(adapter)


def rewritten(source: str, target, change) -> str:
    """A copy of a LoRA file with other tensors; the header stays."""
    tensors = load_file(source)
    with safe_open(source, "pt") as file:
        header = file.metadata()
    change(tensors)
    save_file(tensors, target, header)
    return str(target)


def test_a_fresh_lora_changes_nothing(bases) -> None:
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    before, state = prediction(adapter), torch.get_rng_state()
    lora.attach(adapter)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(prediction(adapter), before)
    assert len(lora.parameters(adapter)) == 146
    trainable = {p for p in adapter.unet.parameters() if p.requires_grad}
    assert trainable == set(lora.parameters(adapter).values())
    with pytest.raises(UserError, match="already"):
        lora.attach(adapter)


def test_targets_that_do_not_exist_are_named(bases) -> None:
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    adapter.lora_targets = {"unet": ("no_such_module",)}
    with pytest.raises(UserError, match="no_such_module"):
        lora.attach(adapter)


def test_saved_and_loaded_is_bit_equal(bases, saved) -> None:
    path, tuned = saved
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    base = prediction(adapter)
    lora.load(adapter, path)
    assert torch.equal(prediction(adapter), tuned)
    assert float((tuned - base).abs().max()) > 0.01
    again = load_file(path)
    assert all(torch.equal(value, again[name]) for name, value in lora.state_dict(adapter).items())


def test_plain_diffusers_loads_the_file(bases, saved) -> None:
    """Convolutions, attention, rank and alpha arrive: the prediction is ours."""
    from diffusers import UNet2DConditionModel

    path, tuned = saved
    names = load_file(path)
    assert any(".conv1." in name for name in names) and any(".to_q." in name for name in names)
    unet = UNet2DConditionModel.from_pretrained(bases["own"], subfolder="unet")
    # Without `use_safetensors` diffusers' method for a bare network does not look at a file's header, and loses alpha.
    unet.load_lora_adapter(path, prefix="unet", use_safetensors=True)
    (config,) = unet.peft_config.values()
    assert (config.r, config.lora_alpha) == (2, 3)
    plain = load_adapter("osediff", bases["own"], **NOISE)
    plain.unet = unet.eval()
    assert float((prediction(plain) - tuned).abs().max()) <= 1e-6


@pytest.mark.parametrize("copy", ["fp16", "bf16"])
def test_half_precision_copies_are_the_same_base(copy, bases, saved) -> None:
    adapter = load_adapter("osediff", bases[copy], **NOISE)
    original = load_adapter("osediff", bases["own"], **NOISE)
    assert same_base(adapter.base_model.fingerprint, original.base_model.fingerprint)
    lora.load(adapter, saved[0])


def test_another_base_is_refused_unless_forced(bases, saved) -> None:
    adapter = load_adapter("osediff", bases["other"], **NOISE)
    with pytest.raises(UserError, match=r"was trained on base .*--force-base overrides"):
        lora.load(adapter, saved[0])
    assert not lora.attached(adapter)
    lora.load(adapter, saved[0], force_base=True)
    assert lora.attached(adapter)


@pytest.mark.parametrize("strength", [1.0, 0.1])
def test_a_small_fine_tune_of_the_base_is_another_base(strength, tiny, data, tmp_path) -> None:
    base = load_adapter("osediff", tiny, **NOISE)
    tuned = load_adapter("osediff", tiny, **NOISE)
    lora.load(tuned, data / "gdpo_model.pkl", scale=strength)
    lora.merge(tuned)
    tuned.unet.save_pretrained(tmp_path / "weights" / "unet")
    merged = load_adapter("osediff", tiny, weights=str(tmp_path / "weights"), **NOISE)
    osediff = load_adapter("osediff", tiny, weights=str(data / "osediff.pkl"), **NOISE)
    for other in (merged, osediff):
        assert not same_base(base.base_model.fingerprint, other.base_model.fingerprint)
    path = lora.save(filled(base), tmp_path)
    with pytest.raises(UserError, match="other weights"):
        lora.load(merged, path)


def test_files_that_do_not_fit_are_refused_and_leave_nothing(bases, saved, tmp_path) -> None:
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    before = prediction(adapter)
    first = "unet.conv_in.lora_A.weight"
    cases = {
        "1 missing .first: unet.conv_in.lora_A.weight": lambda t: t.pop(first),
        "1 unexpected .first: unet.new.lora_A.weight": lambda t: t.update({"unet.new.lora_A.weight": torch.ones(1)}),
        r"conv_in.lora_A.weight is \(3, 4, 3, 3\), expected \(2, 4, 3, 3\)": lambda t: t.update(
            {first: torch.ones(3, 4, 3, 3)}
        ),
        "conv_in.lora_A.weight holds values that are not finite": lambda t: t[first].fill_(torch.nan),
    }
    for message, change in cases.items():
        path = rewritten(saved[0], tmp_path / "changed.safetensors", change)
        with pytest.raises(UserError, match=message):
            lora.load(adapter, path)
        assert not lora.attached(adapter)
        assert torch.equal(prediction(adapter), before)
    lora.load(adapter, saved[0])


def test_damaged_and_foreign_files_are_refused(bases, saved, tmp_path) -> None:
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    with open(saved[0], "rb") as file:
        content = file.read()
    (tmp_path / "short.safetensors").write_bytes(content[: len(content) // 2])
    torch.save({"state_dict_unet": {}, "run": print}, tmp_path / "code.pkl")
    torch.save({"weights": torch.ones(2)}, tmp_path / "plain.bin")
    save_file(load_file(saved[0]), tmp_path / "anonymous.safetensors")
    headers = {"bad": "{", "empty": "{}", "old": json.dumps({"base": {"id": "x"}, "rank": 2, "alpha": 3})}
    for name, header in headers.items():
        save_file(load_file(saved[0]), tmp_path / f"{name}.safetensors", {"rewardsr": header})
    with safe_open(saved[0], "pt") as file:
        settings = {run_folder.DIFFUSERS_HEADER: json.dumps({"unet.target_modules": "all-linear"})}
        save_file(load_file(saved[0]), tmp_path / "pattern.safetensors", file.metadata() | settings)
    for name, message in {
        "short.safetensors": "damaged",
        "code.pkl": "could run code",
        "plain.bin": "pickles can run code and are refused",
        "anonymous.safetensors": "does not say which base",
        "bad.safetensors": "damaged header",
        "empty.safetensors": "damaged header",
        "old.safetensors": "damaged header",
        "pattern.safetensors": "damaged header",
        "nowhere.safetensors": "no LoRA at",
    }.items():
        with pytest.raises(UserError, match=message):
            lora.load(adapter, tmp_path / name)
    assert not lora.attached(adapter)


def test_a_lora_of_another_rank_does_not_go_into_an_attached_one(bases, saved) -> None:
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    lora.attach(adapter, 4, 8)
    with pytest.raises(UserError, match="has rank 2 and alpha 3"):
        lora.load(adapter, saved[0])
    assert lora.attached(adapter)


def test_strength(bases, saved) -> None:
    """0 is the base bit for bit; the change of the weights is linear in it."""
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    base = prediction(adapter)
    name = "down_blocks.0.resnets.0.conv1"
    changes = []
    for strength in (1.0, 0.5, 2.0):
        other = load_adapter("osediff", bases["own"], **NOISE)
        lora.load(other, saved[0], scale=strength)
        lora.merge(other)
        changes.append(other.unet.get_submodule(name).weight - adapter.unet.get_submodule(name).weight)
    assert float(changes[0].abs().max()) > 1e-3
    assert torch.allclose(changes[1], changes[0] / 2, atol=1e-6)
    assert torch.allclose(changes[2], changes[0] * 2, atol=1e-6)
    lora.load(adapter, saved[0], scale=0)
    assert torch.equal(prediction(adapter), base)
    lora.set_scale(adapter, 1)
    assert torch.equal(prediction(adapter), saved[1])


def test_merged_equals_unmerged_and_nothing_of_peft_stays(bases, saved) -> None:
    plain = load_adapter("osediff", bases["own"], **NOISE)
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    with pytest.raises(UserError, match="nothing to merge"):
        lora.merge(adapter)
    lora.load(adapter, saved[0])
    lora.merge(adapter)
    assert float((prediction(adapter) - saved[1]).abs().max()) <= 1e-5
    assert not lora.attached(adapter)
    assert not any("peft" in type(module).__module__ for module in adapter.unet.modules())
    assert adapter.unet.state_dict().keys() == plain.unet.state_dict().keys()
    assert not any(parameter.requires_grad for parameter in adapter.unet.parameters())
    with pytest.raises(UserError, match="carries no rewardsr LoRA"):
        lora.save(adapter, bases["own"])
    lora.attach(adapter)  # and the place is free again


def test_reference_is_the_base_and_is_left_even_after_an_error(bases, saved) -> None:
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    base = prediction(adapter)
    lora.load(adapter, saved[0])
    with pytest.raises(RuntimeError, match="inside"), lora.reference(adapter):
        assert torch.equal(prediction(adapter), base)
        raise RuntimeError("inside")
    assert torch.equal(prediction(adapter), saved[1])
    assert all(parameter.requires_grad for parameter in lora.parameters(adapter).values())


def test_reference_inside_reference_stays_the_base(bases, saved) -> None:
    adapter = load_adapter("osediff", bases["own"], **NOISE)
    base = prediction(adapter)
    lora.load(adapter, saved[0])
    with lora.reference(adapter):
        with lora.reference(adapter):
            pass
        assert torch.equal(prediction(adapter), base)
    assert torch.equal(prediction(adapter), saved[1])


def test_the_lora_stays_float32_on_a_half_precision_base(bases, saved, tmp_path) -> None:
    adapter = load_adapter("osediff", bases["own"], dtype=torch.bfloat16, **NOISE)
    lora.load(adapter, saved[0])
    adapter.to("cpu", torch.bfloat16)
    assert adapter.unet.conv_out.base_layer.weight.dtype == torch.bfloat16
    own = lora.parameters(adapter)
    assert {parameter.dtype for parameter in own.values()} == {torch.float32}
    exact = load_file(saved[0])
    assert all(torch.equal(parameter, exact[name]) for name, parameter in own.items())
    assert float((prediction(adapter) - saved[1]).abs().max()) < 0.1
    with pytest.raises(UserError, match="merge in float32"):
        lora.merge(adapter)
    # bf16 rounding of an update of 1e-4 would lose it
    before = own["unet.conv_in.lora_A.weight"].clone()
    own["unet.conv_in.lora_A.weight"].data += 1e-6
    assert not torch.equal(before, own["unet.conv_in.lora_A.weight"])
    lora.save(adapter, tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / run_folder.LORA).values()} == {torch.float32}


def test_a_released_lora_becomes_one_trainable_adapter(tiny, data) -> None:
    adapter = load_adapter("osediff", tiny, **NOISE)
    lora.load(adapter, data / "gdpo_model.pkl")
    lq = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    condition = adapter.encode(lq)
    adapter.predict(adapter.start(condition, Draws(0, 0, [0])), 100, condition).square().mean().backward()
    own = lora.parameters(adapter)
    assert len(own) == 146
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in own.values())
    with pytest.raises(UserError, match="also changes the autoencoder"):
        lora.load(load_adapter("osediff", tiny, **NOISE), data / "osediff.pkl")
