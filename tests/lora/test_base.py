"""What identifies a base: every tensor of every part, whatever the precision; and what a LoRA file says of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewardsr import UserError, load_adapter, lora
from rewardsr.lora.fingerprint import differing, fingerprint, same_base
from rewardsr.testing import tiny_pipeline

FILES = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def parts(adapter) -> dict[str, object]:
    return {**adapter.networks, "text_encoder": adapter._text_encoder, "tokenizer": adapter._tokenizer}


@pytest.fixture
def adapter(tiny_base):
    return load_adapter("osediff", tiny_base, noise_t=250)


@pytest.fixture
def saved(adapter, tmp_path) -> Path:
    lora.attach(adapter, 1)
    return lora.save(adapter, tmp_path / "lora")


@torch.no_grad()
def test_every_tensor_counts(adapter) -> None:
    before = adapter.base_model.fingerprint
    random = torch.Generator().manual_seed(0)
    for name, network in parts(adapter).items():
        if name == "tokenizer":
            continue
        for key, tensor in network.state_dict().items():
            kept = tensor.clone()
            tensor += 0.1 * (tensor.square().mean().sqrt() + 0.01) * torch.randn(tensor.shape, generator=random)
            assert differing(before, fingerprint(parts(adapter))) == [name], key
            tensor.copy_(kept)
    assert fingerprint(parts(adapter)) == before


@torch.no_grad()
def test_one_weight_of_millions_counts(adapter) -> None:
    network = torch.nn.Module()
    network.table = torch.nn.Parameter(torch.randn(3000, 1000, generator=torch.Generator().manual_seed(0)) * 0.02)
    before = fingerprint({"x": network})
    network.table[2000] = network.table[1999]
    assert not same_base(before, fingerprint({"x": network}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 1e-8, 0.0])
def test_rounding_does_not(dtype, size) -> None:
    """Also near the smallest numbers of fp16."""
    network, random = torch.nn.Module(), torch.Generator().manual_seed(0)
    for index in range(200):
        value = size * torch.randn(50 + 97 * index, generator=random) * torch.rand(1, generator=random)
        network.register_parameter(f"p{index}", torch.nn.Parameter(value))
    network.register_parameter("same", torch.nn.Parameter(torch.full((4096,), size * 1.00390625)))
    whole = fingerprint({"x": network})
    assert same_base(whole, fingerprint({"x": network.to(dtype)}))


def test_a_lora_of_a_bf16_base_loads_on_others(tiny_base, tmp_path) -> None:
    """The adapter casts after loading; here the files themselves are rounded, text encoder and all."""
    copy = Path(shutil.copytree(tiny_base, tmp_path / "bf16"))
    for part, file in FILES.items():
        tensors = {key: value.bfloat16() for key, value in load_file(copy / part / file).items()}
        save_file(tensors, copy / part / file, {"format": "pt"})
    rounded = load_adapter("osediff", copy, noise_t=250, dtype=torch.bfloat16)
    lora.attach(rounded)
    lora.save(rounded, tmp_path / "lora")
    lora.load(load_adapter("osediff", tiny_base, noise_t=250), tmp_path / "lora")


def other_tokenizer(base: Path) -> None:
    path = base / "tokenizer" / "vocab.json"
    vocabulary = json.loads(path.read_text())
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(vocabulary))
    (base / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)


def other_tensor(part: str):
    def change(base: Path) -> None:
        tensors = load_file(base / part / FILES[part])
        key = sorted(tensors)[-1]
        save_file(tensors | {key: tensors[key] + 0.1}, base / part / FILES[part], {"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("part", "change"), [*((part, other_tensor(part)) for part in FILES), ("tokenizer", other_tokenizer)]
)
def test_a_lora_is_refused_on_another_base_whose_part_is_named(part, change, tiny_base, saved, tmp_path) -> None:
    copy = Path(shutil.copytree(tiny_base, tmp_path / "copy"))
    change(copy)
    other = load_adapter("osediff", copy, noise_t=250)
    with pytest.raises(UserError, match=rf"other weights \({part}\) than"):
        lora.load(other, saved)
    lora.load(other, saved, force_base=True)


def test_a_file_of_0_1_0_is_checked_by_what_it_knew(tiny, data, tmp_path) -> None:
    path = data / "run_0.1.0" / "checkpoints" / "step-00000002" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert "=" not in json.loads(file.metadata()["rewardsr"])["base"]["fingerprint"]
    own = load_adapter("osediff", tiny, noise_t=250, dtype=torch.bfloat16)
    lora.attach(own, name="another")  # changes the names of the modules
    lora.load(own, path)
    tuned = load_adapter("osediff", tiny, noise_t=250, weights=str(data / "osediff.pkl"))
    for other in (tuned, load_adapter("osediff", tiny_pipeline(tmp_path / "other"), noise_t=250)):
        with pytest.raises(UserError, match=r"other weights than .*--force-base overrides"):
            lora.load(other, path)


# ---- options that a LoRA depends on ----

CASES = {
    "osediff": ({"noise_t": 250}, {"noise_t": 100, "net_t": 100}, "noise_t=250, but this pipeline has 100"),
    "stablesr": ({}, {"start_point": "noise"}, "start_point='lq', but this pipeline has 'noise'"),
    "sd_upscaler": ({}, {"noise_level": 3}, "noise_level=20, but this pipeline has 3"),
    "rewardsr.testing.flow:TinyFlow": ({}, {"shift": 1.0}, "shift=3.0, but this pipeline has 1.0"),
}


def warnings(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return [line for line in found if "was trained with" in line]


@pytest.mark.parametrize("name", CASES)
def test_other_options_than_in_training_are_warned_of(name, tmp_path, caplog) -> None:
    own, other, says = CASES[name]
    family = {"osediff": "sd", "sd_upscaler": "upscaler", "rewardsr.testing.flow:TinyFlow": "flow"}.get(name, name)
    base = tiny_pipeline(tmp_path / "base", family=family)
    trained = load_adapter(name, base, **own)
    lora.attach(trained, 1)
    path = lora.save(trained, tmp_path / "lora")
    lora.load(load_adapter(name, base, **own), path)
    assert not warnings(caplog)
    lora.load(load_adapter(name, base, **other), path)
    (line,) = warnings(caplog)
    assert says in line and "\n" not in line


def test_options_that_come_to_the_same_are_not(tiny_base, saved, tmp_path, caplog) -> None:
    """The time that the network is told follows from the noise, where it is not given."""
    lora.load(load_adapter("osediff", tiny_base, noise_t=250, net_t=100, prompt="a cat", tile=64), saved)
    assert not warnings(caplog)
    lora.load(load_adapter("osediff", tiny_base), saved)
    (line,) = warnings(caplog)
    assert "net_t=100, but this pipeline has 999" in line and "noise_t=250, but this pipeline has None" in line


def test_loras_that_disagree_are_named(tiny_base, saved, tmp_path, caplog) -> None:
    plain = load_adapter("osediff", tiny_base)
    lora.attach(plain, 1)
    other = lora.save(plain, tmp_path / "other")
    lora.load_several(load_adapter("osediff", tiny_base), [(other, 1), (saved, 1)])
    (line,) = warnings(caplog)
    assert str(saved) in line and "noise_t=250" in line
    bare = load_adapter("osediff", tiny_base)
    bare.options = None  # a stranger's adapter that has no such options
    lora.load_several(bare, [(other, 1), (saved, 1)])
    (line,) = warnings(caplog)
    assert str(saved) in line and str(other) in line and "noise_t=250" in line and "None" in line


def test_options_in_a_header_that_are_none(tiny_base, saved, adapter, tmp_path) -> None:
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    about = json.loads(header["rewardsr"])
    assert about["options"] == {"noise_t": 250, "net_t": 100}
    header["rewardsr"] = json.dumps({**about, "options": [250]})
    save_file(load_file(saved), tmp_path / "odd.safetensors", header)
    with pytest.raises(UserError, match=r"options are \[250\]"):
        lora.load(load_adapter("osediff", tiny_base), tmp_path / "odd.safetensors")
