"""Bases from the Hub, as their repositories hold them: whole, beside copies in half precision, or in these only."""

import json
import re
from pathlib import Path

import pytest
import torch
from _support import Commands
from safetensors import safe_open

import rewardsr.hub.outline
from rewardsr import load_adapter, lora, outline, run_folder
from rewardsr.adapters import _networks
from rewardsr.errors import UserError
from rewardsr.hub.fetch import fetch
from rewardsr.pipelines import open_outline

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


@pytest.fixture
def few(monkeypatch) -> None:
    """A sample of a few small tensors, though all of the tiny networks' are small."""
    monkeypatch.setattr(outline, "SMALL", 64)
    monkeypatch.setattr(outline, "MATRICES", 2)
    monkeypatch.setattr(rewardsr.hub.outline, "GAP", 0)
    monkeypatch.setattr(rewardsr.hub.outline, "START", 100)


def fetched(hub, part: str) -> int:
    """Bytes of the weights of a part."""
    return sum(size for path, size in hub.sent if re.search(rf"/{part}/.*\.safetensors", path))


def values(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in network.state_dict().items() if not value.is_meta}


@pytest.mark.parametrize("halves", [(), ("unet",), tuple(WEIGHTS)])
def test_of_an_outline_headers_and_a_sample_are_fetched(hub, tiny_base, few, halves) -> None:
    hub.add(BASE, **contents(Path(tiny_base), halves, whole=False))
    ours, theirs = (open_outline(base=str(base))[0] for base in (BASE, tiny_base))
    assert ours.base_model.fingerprint == theirs.base_model.fingerprint
    for part in ("unet", "vae"):
        found, expected = values(ours.networks[part]), values(theirs.networks[part])
        assert found.keys() == expected.keys() and found
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
    for part, stem in WEIGHTS.items():
        assert 0 < fetched(hub, part) < 0.8 * (Path(tiny_base) / part / f"{stem}.safetensors").stat().st_size


def test_what_is_there_is_not_fetched_again(hub, tiny_base, few) -> None:
    hub.add(BASE, **contents(Path(tiny_base), (), whole=False))
    load_adapter("osediff", BASE)
    before = hub.count("GET", r"\.safetensors")
    open_outline(base=BASE)
    assert hub.count("GET", r"\.safetensors") == before


def test_what_has_to_be_read_whole_is_fetched_whole(hub, tiny_base, few, monkeypatch) -> None:
    hub.add(BASE, **contents(Path(tiny_base), (), whole=False))
    monkeypatch.setattr(_networks, "_outline", lambda *_: None)
    adapter, _ = open_outline(base=BASE)
    whole = load_adapter("osediff", tiny_base)
    for part in ("unet", "vae"):
        expected = whole.networks[part].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in adapter.networks[part].state_dict().items())


def test_who_does_not_read_outlines_gets_whole_networks(hub, tiny_base, few) -> None:
    hub.add(BASE, **contents(Path(tiny_base), (), whole=False))
    with outline.outlined():
        folder, _ = fetch(BASE, "base", ("unet", "vae"))
    for part in ("unet", "vae"):
        name = f"{part}/{WEIGHTS[part]}.safetensors"
        assert (folder / name).read_bytes() == (Path(tiny_base) / name).read_bytes()


def test_a_network_that_cannot_be_had_whole_either(hub, tiny_base, few, monkeypatch) -> None:
    hub.add(BASE, **contents(Path(tiny_base), (), whole=False))

    def gone(*_: object) -> None:
        hub.repositories.clear()

    monkeypatch.setattr(_networks, "_outline", gone)
    with pytest.raises(UserError, match="'ada/base' is not on the Hub"):
        open_outline(base=BASE)


def test_a_lora_is_converted_alike(hub, tiny_base, few, finished, commands: Commands, tmp_path) -> None:
    hub.add(BASE, **contents(Path(tiny_base), (), whole=False))
    assert commands("export", tmp_path / "kohya", "--run", finished, "--format", "kohya").code == 0
    for name, base in (("hub", BASE), ("disk", tiny_base)):
        source = tmp_path / "kohya" / "lora.safetensors"
        assert commands("import", "lora", source, tmp_path / name, "--base", base).code == 0
    with (
        safe_open(tmp_path / "hub" / run_folder.LORA, "pt") as ours,
        safe_open(tmp_path / "disk" / run_folder.LORA, "pt") as theirs,
    ):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours.get_tensor(name), theirs.get_tensor(name)) for name in ours.keys())  # noqa: SIM118
        headers = [json.loads(file.metadata()[run_folder.OUR_HEADER]) for file in (ours, theirs)]
    bases = [header.pop("base") for header in headers]
    assert bases[0]["fingerprint"] == bases[1]["fingerprint"] and headers[0] == headers[1]
    assert BASE in bases[0].values()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "damaged or not a safetensors file"),
        (b"\xff" * 300, "damaged or not a safetensors file"),
        ((20).to_bytes(8, "little") + b'{"a": {"shape": [2]}' + b"0" * 200, "damaged or not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{]", "damaged or not a safetensors file"),
    ],
)
def test_weights_that_are_none(hub, tiny_base, few, content, said) -> None:
    files = contents(Path(tiny_base), (), whole=False)
    hub.add(BASE, **files | {"unet/diffusion_pytorch_model.safetensors": content})
    with pytest.raises(UserError, match=said):
        open_outline(base=BASE)


def test_a_hub_that_sends_no_parts_of_files(hub, tiny_base, few) -> None:
    hub.add(BASE, **contents(Path(tiny_base), (), whole=False))
    hub.fail("GET", r"/unet/.*\.safetensors", "no ranges")
    with pytest.raises(UserError, match="sends no parts of files here: fetch the base first"):
        open_outline(base=BASE)
