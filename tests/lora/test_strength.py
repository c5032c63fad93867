"""What is written of a LoRA acts as the LoRA does in the pipeline at that moment, whatever its strength."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from rewardsr import UserError, load_adapter, lora
from rewardsr.lora import exchange
from rewardsr.lora.formats import FORMATS

STRENGTHS = [0.5, 2.0, 0.0, -0.7]


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory) -> Path:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    lora.attach(adapter, 3, 5)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in lora.parameters(adapter).values():
            value.copy_(0.1 * torch.randn(value.shape, generator=random))
    return lora.save(adapter, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def fresh(tiny_base):
    return lambda: load_adapter("osediff", tiny_base, noise_t=250)


@torch.no_grad()
def run(network) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    z, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 7, 16, generator=random)
    return network(z, 100, text).sample


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) <= 2e-6


@pytest.mark.parametrize("strength", STRENGTHS)
def test_a_saved_lora_acts_as_it_did(strength, fresh, saved, tmp_path) -> None:
    adapter, again = fresh(), fresh()
    plain = run(adapter.unet)
    lora.load(adapter, saved, strength)
    lora.load(again, lora.save(adapter, tmp_path))
    assert alike(run(again.unet), run(adapter.unet)) and alike(run(adapter.unet), plain) == (strength == 0)
    lora.load(adapter, tmp_path)  # and into the one that is attached, whose strength was another
    assert alike(run(again.unet), run(adapter.unet))
    if strength > 0:  # the tensors stay as they are: alpha says it
        assert all(torch.equal(value, load_file(saved)[key]) for key, value in lora.state_dict(again).items())
        assert lora.rank_and_alpha(again) == (3, 5 * strength)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "osediff"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_so_does_an_exported_one(form, strength, fresh, saved, tmp_path) -> None:
    adapter, again = fresh(), fresh()
    lora.load(adapter, saved, strength)
    ours = run(adapter.unet)
    exchange.export(adapter, tmp_path / "out", form)
    if form == "merged":
        theirs = run(UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet"))
    else:
        source = tmp_path / "out"
        exchange.import_lora(again, source if form == "peft" else next(source.glob("*.safetensors")))
        theirs = run(again.unet)
    assert alike(theirs, ours)


def test_so_does_the_sum_of_several(fresh, saved, tmp_path) -> None:
    adapter, again = fresh(), fresh()
    lora.load_several(adapter, [(saved, 0.7), (saved, -0.3)])
    lora.set_scale(adapter, 0.5)
    lora.load(again, lora.save(adapter, tmp_path))
    assert alike(run(again.unet), run(adapter.unet))
    lora.detach(again)
    lora.load(again, saved, 0.2)
    assert alike(run(again.unet), run(adapter.unet))


def test_strengths_that_differ_by_layer_are_kept(fresh, saved, tmp_path) -> None:
    """As `set_adapters` of diffusers sets them, block by block, on a pipeline that is shared."""
    adapter, again = fresh(), fresh()
    lora.load(adapter, saved)
    for block, strength in (("down_blocks", 0.2), ("up_blocks", -1.5)):
        for module in getattr(adapter.unet, block).modules():
            if hasattr(module, "set_scale"):
                module.set_scale("rewardsr", strength)
    lora.load(again, lora.save(adapter, tmp_path))
    assert alike(run(again.unet), run(adapter.unet))
    assert not alike(run(fresh().unet), run(adapter.unet))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_strength_that_is_no_number_is_refused(strength, fresh, saved) -> None:
    adapter = fresh()
    for load in (lambda: lora.load(adapter, saved, strength), lambda: lora.load_several(adapter, [(saved, strength)])):
        with pytest.raises(UserError, match="expected a finite number"):
            load()
    assert not lora.attached(adapter)
