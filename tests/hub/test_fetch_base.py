"""Bases from the Hub, as their repositories hold them: whole, beside copies in half precision, or in these only."""

from pathlib import Path

import pytest

from rewardsr import load_adapter, lora

BASE = "ada/base"
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def contents(base: Path, halves: tuple[str, ...], whole: bool) -> dict[str, bytes]:
    """The files of a repository; parts in `halves` have copies called fp16, in place of the others unless `whole`."""
    files = {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    for part in halves:
        name = f"{part}/{WEIGHTS[part]}"
        content = files[f"{name}.safetensors"] if whole else files.pop(f"{name}.safetensors")
        files[f"{name}.fp16.safetensors"] = content
    return files


@pytest.mark.parametrize(
    ("halves", "whole", "fetched"),
    [(("unet",), False, ["unet"]), (tuple(WEIGHTS), False, sorted(WEIGHTS)), (tuple(WEIGHTS), True, [])],
)
def test_half_precision_is_fetched_where_there_is_nothing_else(hub, tiny_base, halves, whole, fetched) -> None:
    hub.add(BASE, **contents(Path(tiny_base), halves, whole))
    adapter = load_adapter("osediff", BASE)
    assert lora.fingerprint.same_base(
        adapter.base_model.fingerprint, load_adapter("osediff", tiny_base).base_model.fingerprint
    )
    assert [part for part in sorted(WEIGHTS) if hub.count("GET", rf"/{part}/.*\.fp16\.")] == fetched
