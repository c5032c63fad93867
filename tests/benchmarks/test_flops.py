"""The step does what the maths needs and nothing else: counted at Stable Diffusion 2.1's real size, without memory."""

import copy
from argparse import Namespace

import pytest
import torch
from _count import META, count_gdpo, count_released_gdpo, gdpo_needs, gdpo_released, unit_flops
from _sizes import PARAMETERS, parameter_counts, pipeline

from rewardsr import lora

# GFLOP of GDPO-SR's released step by part, measured on its own code: SD 2.1-base, 512 px, G = 6, batch 1.
MEASURED = {
    "text": 586.7,
    "LQ encode": 1_116.7,
    "group sampling": 4_825.5,
    "decode": 15_087.1,
    "re-encode": 6_700.0,
    "policy forward": 4_861.6,
    "backward": 5_629.3,
    "reference forward": 4_825.5,
    "unused decodes": 30_174.2,
}


def chosen(**changed: object) -> Namespace:
    """Options of the benchmark as its command line would give them."""
    usual = {"crop": 64, "group": 6, "micro_batch": None, "gradient_checkpointing": False, "rewards": "psnr"}
    return Namespace(**{**usual, **changed})


def bare(size: str):
    """Networks without memory, and a second UNet that has no LoRA."""
    adapter = pipeline(size, META, torch.float32)
    second = copy.deepcopy(adapter.unet)
    lora.attach(adapter)
    return adapter, second


def test_steps_of_the_papers_size() -> None:
    adapter, second = bare("sd21")
    assert parameter_counts(adapter) == PARAMETERS
    units = unit_flops(adapter, 512)
    paper = chosen(crop=512)
    released = count_released_gdpo(adapter, second, paper, 1)
    assert released == gdpo_released(units, 1, 6)
    assert released.keys() == MEASURED.keys()
    assert all(abs(released[part] / 1e9 - flops) <= 0.06 for part, flops in MEASURED.items())
    assert abs(sum(released.values()) / 1e9 - 73_806.6) < 0.1
    counted = count_gdpo(adapter, paper, "paper", 1)
    assert counted == gdpo_needs(units, "paper", 1, 6), "no second decode, no second reference, no prompt encoded twice"
    for form, gflop in (("paper", 43_090.80), ("conditional", 36_390.85), ("shared", 23_627.2)):  # METHODS' figures
        assert abs(sum(gdpo_needs(units, form, 1, 6).values()) / 1e9 - gflop) < 0.1


@pytest.mark.parametrize(
    ("form", "batch", "setting"),
    [("paper", 2, {}), ("conditional", 1, {}), ("shared", 2, {}), ("paper", 2, {"micro_batch": 2})],
    ids=["batch", "conditional", "shared noise", "micro-batch"],
)
def test_every_form_costs_its_floor(form, batch, setting) -> None:
    adapter, _ = bare("tiny")
    units = unit_flops(adapter, 64)
    assert count_gdpo(adapter, chosen(**setting), form, batch) == gdpo_needs(units, form, batch, 6)


def test_checkpointing_costs_one_more_forward_pass() -> None:
    adapter, _ = bare("tiny")
    needed = gdpo_needs(unit_flops(adapter, 64), "paper", 1, 6)
    counted = count_gdpo(adapter, chosen(gradient_checkpointing=True), "paper", 1)
    more = counted.pop("backward") - needed.pop("backward")
    assert counted == needed
    assert 0.5 * needed["policy forward"] < more <= needed["policy forward"]
