"""Conversions read of a base what they need: headers and a sample; what they write is what a whole base gives."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewardsr import UserError, load_adapter, lora, run_folder
from rewardsr.lora import exchange
from rewardsr.lora.fingerprint import differing, same_base
from rewardsr.outline import SMALL, outlined, sampled
from rewardsr.pipelines import adapter_class, adapter_options, open_outline
from rewardsr.weights import read_outline

UNET = "diffusion_pytorch_model.safetensors"


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file whose tensors are a hole; returns its size."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_the_bytes_of_weights_are_not_read(tmp_path) -> None:
    """12 GB, in a process that may not have so much."""
    shapes = {f"{index:03}.weight": (4096, 4096) for index in range(180)} | {"norm.weight": (320,)}
    shapes |= {f"small.{index:03}.weight": (512, 512) for index in range(200)}
    assert sparse(tmp_path / UNET, shapes) > 12e9
    script = (
        "import resource, sys; from pathlib import Path; from rewardsr.weights import read_outline\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"found = read_outline(Path(sys.argv[1]), '{UNET.removesuffix('.safetensors')}')\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(len(found), sum(not value.is_meta for value in found.values()), grown)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    count, real, grown = map(int, done.stdout.split())
    assert count == 381 and real == 17 and grown < 200 * 2**10  # kB


def test_a_sample_is_small_and_always_the_same() -> None:
    shapes = {f"{index}.weight": (320, 320 * (1 + index % 7)) for index in range(300)} | {"bias": (SMALL,)}
    found = sampled(shapes)
    assert "bias" in found and len(found) == 17 and found == sampled(dict(reversed(shapes.items())))
    assert sampled({}) == set()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def test_a_truncated_file_is_refused(tiny_base, tmp_path) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    cut(base / "unet" / UNET)
    with pytest.raises(UserError, match="damaged"):
        open_outline(base=str(base))


def test_what_is_missing_or_too_much_is_refused(tiny_base, tmp_path) -> None:
    for number, change in enumerate((lambda t: t.pop(sorted(t)[0]), lambda t: t.update(more=torch.zeros(3)))):
        base = Path(shutil.copytree(tiny_base, tmp_path / f"base{number}"))
        tensors = load_file(base / "unet" / UNET)
        change(tensors)
        save_file(tensors, base / "unet" / UNET, {"format": "pt"})
        with pytest.raises(UserError, match=r"lacks|besides"):
            open_outline(base=str(base))


@pytest.fixture(params=["plain", "released"])
def options(request, data) -> dict[str, str]:
    return {} if request.param == "plain" else {"weights": str(data / "osediff.pkl")}


def without_matrices(monkeypatch) -> None:
    """Networks of tests are small enough to be read whole: read less of them."""
    monkeypatch.setattr("rewardsr.outline.SMALL", 64)
    monkeypatch.setattr("rewardsr.outline.MATRICES", 3)


def test_a_fingerprint_of_an_outline_is_that_of_the_base(tiny, options, tmp_path, monkeypatch) -> None:
    whole = load_adapter("osediff", tiny, **options)
    without_matrices(monkeypatch)
    with outlined():
        part = adapter_class("osediff").load(str(tiny), adapter_options("osediff", options))
    assert any(value.is_meta for value in part.unet.parameters())
    assert same_base(part.base_model.fingerprint, whole.base_model.fingerprint)
    other = Path(shutil.copytree(tiny, tmp_path / "other"))
    tensors = load_file(other / "unet" / UNET)
    save_file({key: value + 0.1 for key, value in tensors.items()}, other / "unet" / UNET, {"format": "pt"})
    with outlined():
        changed = adapter_class("osediff").load(str(other), adapter_options("osediff", options))
    assert differing(changed.base_model.fingerprint, whole.base_model.fingerprint) == ["unet"]
    unknown = re.sub(r":[\w=-]+", ":", part.base_model.fingerprint)
    assert not same_base(unknown, whole.base_model.fingerprint)


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_an_export_is_the_same_as_of_a_whole_base(form, tiny_base, tmp_path, commands, monkeypatch) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    lora.attach(adapter, 2, 4.0)
    for parameter in lora.parameters(adapter).values():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(parameter)))
    saved = lora.save(adapter, tmp_path / "lora")
    exchange.export(adapter, tmp_path / "whole", form)
    without_matrices(monkeypatch)
    answer = commands(
        "export", tmp_path / "out", "--format", form, "--lora", saved, "--base", tiny_base, "--option", "noise_t=250"
    )
    assert answer.code == 0, answer.err
    for path in (tmp_path / "whole").rglob("*.safetensors"):
        theirs, ours = load_file(path), load_file(tmp_path / "out" / path.relative_to(tmp_path / "whole"))
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    answer = commands("export", tmp_path / "x", "--format", form, "--base", tiny_base)
    assert answer.code == 2 and "--lora" in answer.err


def test_absent_modules_stay_absent(tiny_base, tmp_path, commands) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    module, (out, kernel) = next(iter(lora.target_shapes(adapter, "unet", ["to_q"]).items()))
    name = f"lora_unet_{module.replace('.', '_')}"
    source = {
        f"{name}.lora_down.weight": torch.randn(3, *kernel),
        f"{name}.lora_up.weight": torch.randn(out, 3),
        f"{name}.alpha": torch.tensor(3.0),
    }
    save_file(source, tmp_path / "kohya.safetensors")
    where = ("--base", tiny_base, "--option", "noise_t=250")
    answer = commands("import", "lora", tmp_path / "kohya.safetensors", tmp_path / "ours", *where)
    assert answer.code == 0, answer.err
    held = load_file(tmp_path / "ours" / run_folder.LORA)
    assert held.keys() == {f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight"}
    answer = commands("export", tmp_path / "back", "--format", "kohya", "--lora", tmp_path / "ours", *where)
    assert answer.code == 0, answer.err
    back = load_file(tmp_path / "back" / "lora.safetensors")
    assert back.keys() == source.keys() and all(torch.equal(back[key], source[key]) for key in source)
    lora.load(adapter, tmp_path / "ours")
    assert len(lora.parameters(adapter)) == 2
    # Beside a LoRA on all modules it acts as ever.
    whole, other = load_adapter("osediff", tiny_base, noise_t=250), load_adapter("osediff", tiny_base, noise_t=250)
    lora.attach(whole, 1)
    saved = lora.save(whole, tmp_path / "whole")
    lora.load_several(other, [(saved, 0.5), (tmp_path / "ours", 0.5)])
    change = other.unet.get_submodule(module).get_delta_weight(lora.NAME)
    assert torch.allclose(
        change, 0.5 * source[f"{name}.lora_up.weight"] @ source[f"{name}.lora_down.weight"], atol=1e-6
    )


def test_an_interrupted_run_is_its_newest_checkpoint(tiny_base, hq_folder, tmp_path, commands) -> None:
    run = tmp_path / "run"
    assert commands.finetune(tiny_base, hq_folder, run, "--set", "checkpoint_every=1").code == 0
    last = load_file(run / run_folder.LORA)
    (run / run_folder.LORA).unlink()
    newest = run / "checkpoints" / "step-00000002"
    (run / "checkpoints" / "step-00000003").mkdir()  # holds nothing
    for number, named in enumerate((run, newest)):
        answer = commands("export", tmp_path / f"out{number}", "--run", named, "--format", "diffusers")
        assert answer.code == 0, answer.err
        assert ("step-00000002" in answer.out and "did not end" in answer.out) == (named == run)
        made = load_file(tmp_path / f"out{number}" / run_folder.LORA)
        assert all(torch.equal(made[key], last[key]) for key in last)
    answer = commands("upscale", hq_folder / "000.png", "--run", run, "-o", tmp_path / "up", "--device", "cpu")
    assert answer.code == 0 and "step-00000002" in answer.out, answer.err
    answer = commands("push", run, "user/name")
    assert answer.code == 2 and "it is not finished" in answer.err


def test_an_outline_reads_no_more_than_it_says(tiny_base, monkeypatch) -> None:
    without_matrices(monkeypatch)
    found = read_outline(Path(tiny_base) / "unet", UNET.removesuffix(".safetensors"))
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert {name for name, value in found.items() if not value.is_meta} == sampled(shapes) != found.keys()
    with safe_open(Path(tiny_base) / "unet" / UNET, "pt") as file:
        assert all(torch.equal(found[name], file.get_tensor(name)) for name in sampled(shapes))
