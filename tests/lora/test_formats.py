"""Exported LoRAs in the programs that they are meant for, and the way back; several LoRAs at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewardsr import UserError, load_adapter, lora, run_folder
from rewardsr.lora import exchange
from rewardsr.lora.formats import FORMATS

TOLERANCE = 1e-5


def shaken(adapter, seed: int = 0, rank: int = 4, alpha: float = 8):
    """The adapter with a LoRA whose every tensor counts."""
    lora.attach(adapter, rank, alpha)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in lora.parameters(adapter).values():
            value.copy_(0.1 * torch.randn(value.shape, generator=random))
    return adapter


def given(adapter) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    width = adapter.unet.config.cross_attention_dim
    return {"z": torch.randn(2, 4, 8, 8, generator=random), "text": torch.randn(2, 7, width, generator=random)}


@torch.no_grad()
def run(adapter) -> torch.Tensor:
    entry = given(adapter)
    return adapter.unet(entry["z"], 100, entry["text"]).sample


def osediff(tiny, data):
    return load_adapter("osediff", tiny, weights=data / "osediff.pkl")


@pytest.fixture(scope="module")
def exports(tmp_path_factory, tiny, data) -> Path:
    """Every form in its folder, what another process makes of each, and what we make of it (`ours`)."""
    root = tmp_path_factory.mktemp("exports")
    adapter = osediff(tiny, data)
    shutil.copytree(tiny, root / "base")
    shutil.copytree(Path(tiny) / "unet", root / "plain" / "unet")
    for component in ("unet", "vae"):
        shutil.rmtree(root / "base" / component)
        adapter.networks[component].save_pretrained(root / "base" / component)
    shaken(adapter)
    save_file(given(adapter), root / "input.safetensors")
    save_file({"ours": run(adapter)}, root / "ours.safetensors")
    for form in FORMATS:
        exchange.export(adapter, root / form, form)
    subprocess.run([sys.executable, Path(__file__).with_name("consumers.py"), root], check=True, capture_output=True)
    return root


@pytest.mark.parametrize(
    "consumer", ["diffusers", "peft", "kohya in diffusers", "kohya in ComfyUI", "osediff", "merged"]
)
def test_another_program_makes_the_same_of_it(exports, consumer, record_property) -> None:
    theirs, ours = load_file(exports / "outputs.safetensors"), load_file(exports / "ours.safetensors")["ours"]
    error = float((theirs[consumer] - ours).abs().max())
    record_property(f"{consumer} ({TOLERANCE:g})", f"{error:.2e}")
    assert float((theirs["base"] - ours).abs().max()) > 0.01, "the LoRA does nothing"
    assert error <= TOLERANCE


def test_strength_zero_is_the_base_bit_for_bit(exports) -> None:
    theirs = load_file(exports / "outputs.safetensors")
    assert torch.equal(theirs["none"], theirs["base"])


def test_half_the_strength_is_half_the_weights(exports, tiny, data) -> None:
    adapter = osediff(tiny, data)
    lora.load(adapter, exports / "diffusers", scale=0.5)
    assert float((load_file(exports / "outputs.safetensors")["half"] - run(adapter)).abs().max()) <= TOLERANCE
    # Exported at that strength, it is in the file: alpha says so, the tensors stay.
    again = osediff(tiny, data)
    exchange.export(adapter, exports / "weaker", "diffusers")
    lora.load(again, exports / "weaker")
    assert lora.rank_and_alpha(again) == (4, 4.0)
    assert torch.equal(run(again), run(adapter))


def test_kohya_states_true_alphas(exports) -> None:
    tensors = load_file(exports / "kohya" / "lora.safetensors")
    alphas = {float(value) for name, value in tensors.items() if name.endswith(".alpha")}
    ranks = {value.shape[0] for name, value in tensors.items() if name.endswith("lora_down.weight")}
    assert alphas == {8.0} and ranks == {4}


# ---- the way back ----


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_there_and_back(exports, form, tiny, data) -> None:
    adapter = osediff(tiny, data)
    source = exports / form
    source = {"diffusers": source / run_folder.LORA, "peft": source, "kohya": source / "lora.safetensors"}[form]
    exchange.import_lora(adapter, source)
    assert lora.rank_and_alpha(adapter) == (4, 8.0)
    assert torch.equal(run(adapter), load_file(exports / "ours.safetensors")["ours"])


def test_a_file_with_other_ranks_and_fewer_modules(tmp_path, tiny_base) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    shapes = lora.target_shapes(adapter, "unet")
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(0)
    for rank, module in zip((2, 3, 5), sorted(shapes)[::7], strict=False):
        out, kernel = shapes[module]
        down, up = (
            torch.randn(rank, *kernel, generator=random),
            torch.randn(out, rank, *[1] * (len(kernel) - 1), generator=random),
        )
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(1.0 + rank)
        expected[module] = lora.delta(down, up, (1.0 + rank) / rank)
    save_file(tensors, tmp_path / "some.safetensors")
    before = {name: value.clone() for name, value in adapter.unet.state_dict().items()}
    exchange.import_lora(adapter, tmp_path / "some.safetensors")
    lora.merge(adapter)
    for module in shapes:
        change = adapter.unet.state_dict()[f"{module}.weight"] - before[f"{module}.weight"]
        wanted = expected.get(module, torch.zeros_like(change))
        assert torch.allclose(change, wanted, atol=1e-5), module


def test_without_alpha_it_is_the_rank(tmp_path, exports, tiny, data) -> None:
    adapter = osediff(tiny, data)
    tensors = load_file(exports / "kohya" / "lora.safetensors")
    save_file({n: v for n, v in tensors.items() if not n.endswith(".alpha")}, tmp_path / "bare.safetensors")
    save_file(load_file(exports / "diffusers" / run_folder.LORA), tmp_path / "headless.safetensors")
    for name in ("bare", "headless"):
        exchange.import_lora(adapter, tmp_path / f"{name}.safetensors")
        assert lora.rank_and_alpha(adapter) == (4, 4.0)
        lora.detach(adapter)


def test_what_is_imported_is_saved_as_ours(exports, tmp_path, tiny, data) -> None:
    adapter = osediff(tiny, data)
    file = exchange.import_lora(adapter, exports / "kohya" / "lora.safetensors", tmp_path / "out")
    assert file == tmp_path / "out" / run_folder.LORA
    for source, message in ((tmp_path / "out", "exists already"), (tmp_path / "other", "carries a rewardsr LoRA")):
        with pytest.raises(UserError, match=message):
            exchange.import_lora(adapter, exports / "kohya" / "lora.safetensors", source)
    again = osediff(tiny, data)
    lora.load(again, file)
    assert torch.equal(run(again), run(adapter))


# ---- several at once ----


def test_several_together_are_the_sum_of_their_weights(tiny_base, tmp_path) -> None:
    for name, settings in {"one": {"seed": 1}, "other": {"seed": 2, "rank": 2, "alpha": 3}}.items():
        lora.save(shaken(load_adapter("osediff", tiny_base, noise_t=250), **settings), tmp_path / name)
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    before = {name: value.clone() for name, value in adapter.unet.state_dict().items()}
    one, other = (lora.read(adapter, lora.locate(tmp_path / name)).tensors for name in ("one", "other"))
    lora.load_several(adapter, [(tmp_path / "one", 0.7), (tmp_path / "other", -0.3)])
    lora.merge(adapter)
    for module in lora.target_shapes(adapter, "unet"):
        a, b = f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight"
        wanted = lora.delta(one[a], one[b], 0.7 * 2.0) + lora.delta(other[a], other[b], -0.3 * 1.5)
        change = adapter.unet.state_dict()[f"{module}.weight"] - before[f"{module}.weight"]
        assert torch.allclose(change, wanted, atol=1e-5), module


# ---- other components than the UNet ----


def test_each_component_of_seesr_has_its_file_and_its_loader(tiny_seesr, tmp_path) -> None:
    adapter = shaken(load_adapter("seesr", tiny_seesr, steps=2))
    exchange.export(adapter, tmp_path / "out", "diffusers")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {run_folder.LORA, "controlnet_lora.safetensors"}
    plain = load_adapter("seesr", tiny_seesr, steps=2)
    exchange.load_component(plain.controlnet, tmp_path / "out" / "controlnet_lora.safetensors")
    exchange.load_component(plain.unet, tmp_path / "out" / run_folder.LORA)
    entry = given(adapter) | {"control": torch.rand(2, 3, 64, 64), "ram": torch.randn(2, 10, 512)}

    @torch.no_grad()
    def eps(of) -> torch.Tensor:
        from rewardsr.batch import Condition

        condition = Condition(
            entry["text"], entry["z"], (64, 64), control=entry["control"], extras={"ram": entry["ram"]}
        )
        return of.predict(entry["z"], 100, condition)

    assert torch.equal(eps(plain), eps(adapter))
    other = load_adapter("seesr", tiny_seesr)
    with pytest.raises(UserError, match="does not fit"):
        exchange.load_component(other.unet, tmp_path / "out" / "controlnet_lora.safetensors")
    assert not lora.names(other)
    with pytest.raises(UserError, match="kohya"):
        exchange.export(adapter, tmp_path / "kohya", "kohya")
    assert not (tmp_path / "kohya").exists()


def test_an_autoencoders_lora_has_its_file_and_its_loader(tiny, tmp_path) -> None:
    """As a family would have it that adapts the autoencoder's encoder, too; OSEDiff's targets."""
    import diffusers

    adapter = load_adapter("osediff", tiny, noise_t=250)
    adapter.trainable["vae"] = adapter.vae
    adapter.lora_targets["vae"] = ("encoder.conv_in", "conv1", "conv2", "conv_shortcut", "quant_conv", "to_q", "to_v")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    before = adapter.to_latents(picture)
    shaken(adapter)
    exchange.export(adapter, tmp_path / "out", "diffusers")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {run_folder.LORA, "vae_lora.safetensors"}
    plain = diffusers.AutoencoderKL.from_pretrained(Path(tiny) / "vae")
    exchange.load_component(plain, tmp_path / "out" / "vae_lora.safetensors")
    with torch.no_grad():
        theirs = plain.encode(picture * 2 - 1).latent_dist.mean * plain.config.scaling_factor
        ours = adapter.to_latents(picture)
    assert torch.equal(theirs, ours) and not torch.allclose(ours, before)


def test_a_component_file_with_a_damaged_header_is_refused(tiny_seesr, tmp_path) -> None:
    network = load_adapter("seesr", tiny_seesr).controlnet
    tensors = {"controlnet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3)}
    for header in ("{", "{}", "[]"):
        save_file(tensors, tmp_path / "c.safetensors", {run_folder.DIFFUSERS_HEADER: header})
        with pytest.raises(UserError, match="damaged header"):
            exchange.load_component(network, tmp_path / "c.safetensors")


# ---- bad input ----


def test_exports_that_cannot_be(tiny_base, tmp_path, data) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    with pytest.raises(UserError, match="carries no rewardsr LoRA"):
        exchange.export(adapter, tmp_path / "out", "peft")
    shaken(adapter)
    with pytest.raises(UserError, match="unknown format 'safetensors': known: diffusers, peft"):
        exchange.export(adapter, tmp_path / "out", "safetensors")
    with pytest.raises(UserError, match="exists already"):
        exchange.export(adapter, tmp_path, "peft")
    with pytest.raises(UserError, match=r"weights=FILE\.pkl"):
        exchange.export(adapter, tmp_path / "out", "osediff")
    lora.attach(adapter, name="second", active=False)
    with pytest.raises(UserError, match="merge or detach second first"):
        exchange.export(adapter, tmp_path / "out", "merged")
    adapter.released = str(data / "osediff.pkl")
    with pytest.raises(UserError, match="another size"):
        exchange.export(adapter, tmp_path / "out", "osediff")
    assert list(tmp_path.iterdir()) == []


DOWN, UP, ALPHA = (f"lora_unet_conv_in.{part}" for part in ("lora_down.weight", "lora_up.weight", "alpha"))
LINEAR = "unet.time_embedding.linear_1"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_nowhere.lora_down.weight": (1, 1)}, "nowhere.lora_down.weight is no LoRA tensor of a module"),
        ({"lora_te_x.lora_down.weight": (1, 1), DOWN: (1, 4, 3, 3), UP: (8, 1, 1, 1)}, "lora_te_x.* is no LoRA tensor"),
        ({DOWN: (1, 4, 3, 3)}, "lora_up.weight is missing"),
        ({UP: (8, 1, 1, 1)}, "lora_down.weight is missing"),
        ({DOWN: (1, 4, 3, 3), UP: (8, 1, 1, 1), "lora_unet_conv_in.dora_scale": (8,)}, "dora_scale is no LoRA tensor"),
        ({DOWN: (1, 4, 3, 3), UP: (8, 1, 1, 1), ALPHA: ()}, "expected positive numbers"),
        ({DOWN: (1, 4, 3, 3), UP: (8, 1, 1, 1), ALPHA: (2,)}, "expected positive numbers"),
        ({DOWN: (), UP: (8, 1, 1, 1)}, "expected positive numbers"),
        ({DOWN: (1, 4, 1, 1), UP: (8, 1, 1, 1)}, "another size"),
        ({DOWN: (1, 4, 3, 3), UP: (1, 8, 1, 1)}, "another size"),
        ({"unet.conv_in.weight": (1,)}, "unet.conv_in.weight is no LoRA tensor"),
        ({"transformer.x.lora_A.weight": (1, 1)}, "transformer.x.* is no LoRA tensor"),
        (
            {f"{LINEAR}.lora_A.weight": (1, 8), f"{LINEAR}.lora_B.weight": (32, 1)},
            "time_embedding.linear_1.* of a module that adapter 'osediff' adapts",
        ),
        ({}, "no LoRA tensors"),
    ],
)
def test_every_key_is_used_or_refused_by_name(tensors, message, tiny_base, tmp_path) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        exchange.import_lora(adapter, tmp_path / "a.safetensors")
    assert not lora.attached(adapter)


def test_sources_that_are_no_loras(exports, tiny_base, tmp_path) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    for folder, config in {"bare": None, "damaged": {"r": 4}}.items():
        (tmp_path / folder).mkdir()
        if config is not None:
            (tmp_path / folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save({"x": torch.zeros(1)}, tmp_path / "g.pt")
    for source, message in {
        exports / "kohya" / "lora.safetensors": "another size",
        tmp_path / "bare": "adapter_config.json",
        tmp_path / "damaged": "damaged",
        tmp_path / "g.pt": "neither safetensors nor",
        tmp_path / "nowhere.safetensors": "no file",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            exchange.import_lora(adapter, source)
        assert "\n" not in str(caught.value)


def test_the_command_names_every_format(commands) -> None:
    said = " ".join(commands("export", "--help").out.split())
    assert all(form in said for form in FORMATS)
