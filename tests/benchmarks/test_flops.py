"""The step does what the maths needs and nothing else: counted at Stable Diffusion 2.1's real size, without memory."""

from argparse import Namespace

import pytest
import torch
from _count import META, count_ours, count_released, gdpo_needs, gdpo_released, rfsr_needs, unit_flops
from _setup import make_adapter, method_of, prepare_adapter, released_of, seconds_of
from _sizes import PARAMETERS, parameter_counts, vgg_file

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
    usual = {
        **{"size": "tiny", "crop": 64, "trainer": "gdpo", "adapter": "osediff", "rewards": "psnr", "group": 6},
        **{
            "micro_batch": None,
            "gradient_checkpointing": False,
            "compile": False,
            "rollout": "denoise",
            "vgg": None,
            "sampler_steps": 5,
        },
    }
    return Namespace(**{**usual, **changed})


def bare(options: Namespace):
    """An adapter whose networks have no memory, and the networks of the released step."""
    adapter = make_adapter(options, META, torch.float32)
    second = seconds_of(adapter, options, META, torch.float32)
    prepare_adapter(adapter, Namespace(**{**vars(options), "gradient_checkpointing": False}))
    return adapter, second


def test_steps_of_the_papers_size() -> None:
    paper = chosen(size="sd21", crop=512)
    adapter, _ = bare(paper)
    assert parameter_counts(adapter) == PARAMETERS
    units = unit_flops(adapter, 512)
    released = gdpo_released(units, 1, 6)
    assert released.keys() == MEASURED.keys()
    assert all(abs(released[part] / 1e9 - flops) <= 0.06 for part, flops in MEASURED.items())
    assert abs(sum(released.values()) / 1e9 - 73_806.6) < 0.1
    counted = count_ours(method_of(adapter, paper, "paper"), paper, 1)
    assert counted == gdpo_needs(units, "paper", 1, 6), "no second decode, no second reference, no prompt encoded twice"
    for form, gflop in (("paper", 43_090.80), ("conditional", 36_390.85), ("shared", 23_627.2)):  # METHODS' figures
        assert abs(sum(gdpo_needs(units, form, 1, 6).values()) / 1e9 - gflop) < 0.1


@pytest.mark.parametrize(
    ("form", "batch", "setting"),
    [("paper", 2, {}), ("conditional", 1, {}), ("shared", 2, {}), ("paper", 2, {"micro_batch": 2})],
    ids=["batch", "conditional", "shared noise", "micro-batch"],
)
def test_every_form_costs_its_floor(form, batch, setting) -> None:
    options = chosen(**setting)
    adapter, _ = bare(options)
    units = unit_flops(adapter, 64)
    assert count_ours(method_of(adapter, options, form), options, batch) == gdpo_needs(units, form, batch, 6)


@pytest.mark.parametrize("batch", [1, 2])
def test_the_released_step_costs_what_it_is_said_to(batch) -> None:
    options = chosen()
    adapter, second = bare(options)
    released = released_of(method_of(adapter, options, "paper"), options, second)
    assert count_released(released, options, batch) == gdpo_released(unit_flops(adapter, 64), batch, 6)


def test_checkpointing_costs_one_more_forward_pass() -> None:
    options = chosen()
    adapter, _ = bare(options)
    needed = gdpo_needs(unit_flops(adapter, 64), "paper", 1, 6)
    adapter.enable_gradient_checkpointing()
    counted = count_ours(method_of(adapter, options, "paper"), options, 1)
    more = counted.pop("backward") - needed.pop("backward")
    assert counted == needed
    assert 0.5 * needed["policy forward"] < more <= needed["policy forward"]


@pytest.mark.parametrize(
    ("name", "form", "batch", "passes"),
    [("osediff", "whole", 2, 0), ("seesr", "early", 1, 2), ("seesr", "late", 1, 0)],
)
def test_rfsr_costs_its_floor(name, form, batch, passes, tmp_path) -> None:
    setting = {"trainer": "rfsr", "adapter": name, "rewards": "detail", "rollout": "denoise" if passes else "none"}
    options = chosen(**setting, vgg=vgg_file(tmp_path, "tiny"))
    adapter, second = bare(options)
    units = unit_flops(adapter, 64, method_of(adapter, options, form))
    needed = rfsr_needs(units, form, batch, passes)
    assert count_ours(method_of(adapter, options, form), options, batch) == needed
    released = count_released(released_of(method_of(adapter, options, form), options, second), options, batch)
    assert released["HQ encode"] == needed["LQ encode"]
    if name == "osediff":
        assert {part: flops for part, flops in released.items() if part != "HQ encode"} == needed
