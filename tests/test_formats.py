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
from rewardsr.lora import exchange, foreign

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
    for form in exchange.FORMATS:
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
    back = foreign.read_foreign(adapter, source)
    assert (back.rank, back.alpha) == (4, 8.0)
    exchange.place(adapter, back)
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
    exchange.place(adapter, foreign.read_foreign(adapter, tmp_path / "some.safetensors"))
    lora.merge(adapter)
    for module in shapes:
        change = adapter.unet.state_dict()[f"{module}.weight"] - before[f"{module}.weight"]
        wanted = expected.get(module, torch.zeros_like(change))
        assert torch.allclose(change, wanted, atol=1e-5), module


def test_without_alpha_it_is_the_rank(tmp_path, tiny_base, exports, tiny, data) -> None:
    adapter = osediff(tiny, data)
    tensors = load_file(exports / "kohya" / "lora.safetensors")
    save_file({n: v for n, v in tensors.items() if not n.endswith(".alpha")}, tmp_path / "bare.safetensors")
    assert foreign.read_foreign(adapter, tmp_path / "bare.safetensors").alpha == 4
    save_file(load_file(exports / "diffusers" / run_folder.LORA), tmp_path / "headless.safetensors")
    assert foreign.read_foreign(adapter, tmp_path / "headless.safetensors").alpha == 4


# ---- several at once ----


def test_several_together_are_the_sum_of_their_weights(tiny_base) -> None:
    one = exchange.lora_of(shaken(load_adapter("osediff", tiny_base, noise_t=250), 1))
    other = exchange.lora_of(shaken(load_adapter("osediff", tiny_base, noise_t=250), 2, rank=2, alpha=3))
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    before = {name: value.clone() for name, value in adapter.unet.state_dict().items()}
    exchange.place(adapter, exchange.combine([(one, 0.7), (other, -0.3)]))
    lora.merge(adapter)
    for module in one.pairs["unet"]:
        (a1, b1), (a2, b2) = one.pairs["unet"][module], other.pairs["unet"][module]
        wanted = lora.delta(a1, b1, 0.7 * 2.0) + lora.delta(a2, b2, -0.3 * 1.5)
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
        from rewardsr.adapter import Condition

        condition = Condition(
            entry["text"], entry["z"], (64, 64), control=entry["control"], extras={"ram": entry["ram"]}
        )
        return of.predict(entry["z"], 100, condition)

    assert torch.equal(eps(plain), eps(adapter))
    with pytest.raises(UserError, match="does not fit"):
        exchange.load_component(
            load_adapter("seesr", tiny_seesr).unet, tmp_path / "out" / "controlnet_lora.safetensors"
        )
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
        save_file(tensors, tmp_path / "c.safetensors", {lora.DIFFUSERS_HEADER: header})
        with pytest.raises(UserError, match="damaged header"):
            exchange.load_component(network, tmp_path / "c.safetensors")


# ---- bad input ----


def test_exports_that_cannot_be(tiny_base, tmp_path, data) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    with pytest.raises(UserError, match="carries no rewardsr LoRA"):
        exchange.export(adapter, tmp_path / "out", "peft")
    shaken(adapter)
    with pytest.raises(UserError, match="unknown format 'safetensors': choose one of"):
        exchange.export(adapter, tmp_path / "out", "safetensors")
    with pytest.raises(UserError, match="exists already"):
        exchange.export(adapter, tmp_path, "peft")
    with pytest.raises(UserError, match=r"weights=FILE\.pkl"):
        exchange.export(adapter, tmp_path / "out", "osediff")
    adapter.released = str(data / "osediff.pkl")
    with pytest.raises(UserError, match="another size"):
        exchange.export(adapter, tmp_path / "out", "osediff")
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_belong(exports, tiny_base, tmp_path) -> None:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)

    def refused(source: Path) -> str:
        with pytest.raises(UserError) as caught:
            foreign.read_foreign(adapter, source)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "another size" in refused(exports / "kohya" / "lora.safetensors")
    save_file({"lora_unet_nowhere.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    assert "no module of this UNet" in refused(tmp_path / "a.safetensors")
    save_file({"lora_unet_conv_in.lora_down.weight": torch.zeros(1, 4, 3, 3)}, tmp_path / "b.safetensors")
    assert "lora_up.weight is missing" in refused(tmp_path / "b.safetensors")
    save_file({"unet.conv_in.weight": torch.zeros(1)}, tmp_path / "c.safetensors")
    assert "unexpected key" in refused(tmp_path / "c.safetensors")
    save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "d.safetensors")
    assert "no component" in refused(tmp_path / "d.safetensors")
    name = "unet.time_embedding.linear_1"
    pair = {f"{name}.lora_A.weight": torch.zeros(1, 8), f"{name}.lora_B.weight": torch.zeros(32, 1)}
    save_file(pair, tmp_path / "e.safetensors")
    assert "does not (first: time_embedding.linear_1)" in refused(tmp_path / "e.safetensors")
    flat = {"lora_unet_conv_in.lora_down.weight": torch.zeros(1, 4, 3, 3), "lora_unet_conv_in.alpha": torch.tensor(0.0)}
    save_file(flat | {"lora_unet_conv_in.lora_up.weight": torch.zeros(8, 1, 1, 1)}, tmp_path / "h.safetensors")
    assert "expected positive numbers" in refused(tmp_path / "h.safetensors")
    (tmp_path / "f").mkdir()
    assert "adapter_config.json" in refused(tmp_path / "f")
    (tmp_path / "f" / "adapter_config.json").write_text(json.dumps({"r": 4}))
    assert "damaged" in refused(tmp_path / "f")
    torch.save({"x": torch.zeros(1)}, tmp_path / "g.pt")
    assert "neither safetensors nor" in refused(tmp_path / "g.pt")
    assert "no file" in refused(tmp_path / "nowhere.safetensors")
