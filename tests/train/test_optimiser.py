"""Options of the optimiser reach it, and change what is learnt."""

from collections.abc import Callable

import pytest
import torch
from runs import content, weights

import rewardsr
from rewardsr.options import parse
from rewardsr.train import loop
from rewardsr.train.checkpoint import State
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import set_up
from rewardsr.train.recipe import Recipe


@pytest.fixture
def recipe(folder, tmp_path) -> Callable[..., dict]:
    plain = {"schedule": "constant", "warmup": 0, "weight_decay": 0.0}

    def make(name: str = "run", **options) -> dict:
        optimiser = plain | options
        return content(folder, str(folder / "base"), output=str(tmp_path / name), steps=3, optimiser=optimiser)

    return make


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 5.0},
        {"betas": (0.5, 0.999)},
        {"betas": (0.9, 0.9)},
        {"eps": 1e-2},
        {"clip": 1e-4, "eps": 1e-3},
        {"learning_rate": 2e-3},
    ],
    ids=lambda options: ",".join(options),
)
def test_each_option_changes_what_is_learnt(options, recipe, tmp_path) -> None:
    kept = {"eps": options["eps"]} if "clip" in options else {}  # AdamW heeds the size of gradients by eps alone
    rewardsr.finetune(recipe("plain", **kept))
    rewardsr.finetune(recipe("changed", **options))
    plain, changed = weights(tmp_path / "plain"), weights(tmp_path / "changed")
    apart = torch.cat([(plain[name] - changed[name]).flatten() for name in plain])
    assert float(apart.abs().max()) > 1e-5


def test_an_update_is_adamw_on_the_clipped_gradient(recipe) -> None:
    """The first one, by hand: decay, then the learning rate times g / (|g| + eps), where g is clipped by its norm."""
    options = {"learning_rate": 1e-2, "weight_decay": 0.5, "betas": (0.8, 0.95), "eps": 1e-3, "clip": 0.02}
    setup = set_up(parse(Recipe, recipe(**options), "test"))
    before = {name: value.detach().clone() for name, value in setup.method.trained_weights().items()}
    metrics, _ = loop.step(setup, make_optimiser(setup), State())
    after = setup.method.trained_weights()
    assert metrics["grad_norm"] > 0.02, "else nothing is clipped"
    gradients = {name: value.grad for name, value in after.items()}
    assert float(torch.cat([value.flatten() for value in gradients.values()]).norm()) == pytest.approx(0.02, rel=1e-3)
    for name, start in before.items():
        g = gradients[name]
        expected = start * (1 - 1e-2 * 0.5) - 1e-2 * g / (g.abs() + 1e-3)
        assert torch.allclose(after[name].detach(), expected, atol=1e-7), name
