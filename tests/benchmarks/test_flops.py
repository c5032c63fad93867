"""The step does what the maths needs and nothing else: counted at Stable Diffusion 2.1's real size, without memory."""

from argparse import Namespace

import gdpo_step
import pytest
from _sizes import PARAMETERS


def chosen(**changed: object) -> Namespace:
    """Options of the benchmark as its command line would give them: GDPO-SR's setting, but tiny networks."""
    paper = {
        "size": "tiny",
        "crop": 64,
        "group": 6,
        "batch": 1,
        "preference": "paper",
        "shared_noise": False,
        "micro_batch": None,
        "gradient_checkpointing": False,
    }
    return Namespace(**{**paper, **changed})


def test_a_step_of_the_papers_size_costs_the_floor() -> None:
    counted, needed, parameters = gdpo_step.count(chosen(size="sd21", crop=512))
    assert parameters == PARAMETERS
    assert counted == needed, "part by part: no second decode, no second reference, no prompt encoded twice"
    assert abs(sum(counted.values()) / 1e9 - 43_090.80) < 0.1
    # What the other forms need, of the same networks (METHODS' figures).
    conditional = {part: cost for part, cost in needed.items() if part != "re-encode"}
    assert abs(sum(conditional.values()) / 1e9 - 36_390.85) < 0.1
    once = ("policy forward", "policy backward", "reference forward")
    shared = {part: cost / 6 if part in once else cost for part, cost in conditional.items()}
    assert abs(sum(shared.values()) / 1e9 - 23_627.2) < 0.1


@pytest.mark.parametrize(
    "setting",
    [
        {"batch": 2},
        {"preference": "conditional"},
        {"preference": "conditional", "shared_noise": True, "batch": 2},
        {"batch": 2, "micro_batch": 2},
    ],
    ids=["batch", "conditional", "shared noise", "micro-batch"],
)
def test_every_form_costs_its_floor(setting) -> None:
    counted, needed, _ = gdpo_step.count(chosen(**setting))
    assert counted == needed


def test_checkpointing_costs_one_more_forward_pass() -> None:
    counted, needed, _ = gdpo_step.count(chosen(gradient_checkpointing=True))
    more = counted.pop("policy backward") - needed.pop("policy backward")
    assert counted == needed
    assert 0.5 * needed["policy forward"] < more <= needed["policy forward"]
