"""Every optimiser trains, goes on bit for bit after a stop, follows the schedule, and refuses what it cannot use."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import assert_equal_runs, content, weights
from safetensors import safe_open

import rewardsr
from rewardsr import UserError
from rewardsr.options import parse
from rewardsr.run_folder import MOMENTS
from rewardsr.train import optimiser as optimisers
from rewardsr.train.checkpoint import State
from rewardsr.train.loop import step
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import set_up
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.train.recipe_learning import LEARNING_RATES, OptimiserRecipe

NAMES = [
    "adamw",
    "adafactor",
    pytest.param("prodigy", marks=pytest.mark.skipif(not importlib.util.find_spec("prodigyopt"), reason="absent")),
    pytest.param("adamw8bit", marks=pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="absent")),
]


@pytest.fixture
def recipe(folder, tmp_path) -> Callable[..., dict]:
    """Recipes with a LoRA so wide that some of its tensors have their moments in 8 bits."""

    def make(name: str, output: str = "run", **changes) -> dict:
        options = {"name": name, "schedule": "constant", "warmup": 2} | changes.pop("optimiser", {})
        made = content(folder, str(folder / "base"), str(tmp_path / output), lora={"rank": 128}, **changes)
        return made | {"optimiser": options}

    return make


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_like_a_straight_one(name, recipe, tmp_path, capfd) -> None:
    changes = {"checkpoint_every": 2, "updates_per_group": 2}
    rewardsr.finetune(recipe(name, "straight", steps=5, **changes))
    rewardsr.finetune(recipe(name, steps=3, **changes))
    rewardsr.finetune(recipe(name, steps=5, **changes), resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")
    headers = [header(tmp_path / run) for run in ("straight", "run")]
    assert headers[0] == headers[1]
    moved = torch.cat([value.flatten() for key, value in weights(tmp_path / "run").items() if ".lora_B." in key])
    assert float(moved.abs().max()) > 0
    assert "decay" not in capfd.readouterr().out  # prodigy prints


def header(run: Path) -> dict:
    newest = sorted((run / "checkpoints").iterdir())[-1]
    with safe_open(newest / MOMENTS, framework="pt") as file:
        return json.loads(file.metadata()["numbers"])


def test_what_prodigy_counts_is_kept(recipe, tmp_path) -> None:
    pytest.importorskip("prodigyopt")
    rewardsr.finetune(recipe("prodigy", steps=4, optimiser={"warmup": 0}))
    (group,) = header(tmp_path / "run")["groups"]
    assert group["k"] == 4 and group["d_numerator"] != 0 and group["d_denom"] > 0


def test_moments_of_wide_tensors_are_in_8_bits(recipe, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    rewardsr.finetune(recipe("adamw8bit", steps=1))
    newest = tmp_path / "run" / "checkpoints" / "step-00000001"
    with safe_open(newest / MOMENTS, framework="pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys() if name.endswith("/state1")}  # noqa: SIM118
    assert kinds == {torch.uint8, torch.float32}


@pytest.mark.parametrize("name", NAMES)
def test_the_schedule_reaches_it(name, recipe) -> None:
    setup = set_up(parse(Recipe, recipe(name, steps=8, optimiser={"warmup": 4, "schedule": "cosine"}), "test"))
    optimiser, state = make_optimiser(setup), State()
    rates = []
    for _ in range(6):
        step(setup, optimiser, state)
        rates.append(optimiser.param_groups[0]["lr"] / LEARNING_RATES[name])
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.853553], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_another_optimiser_is_another_run(name, recipe) -> None:
    rewardsr.finetune(recipe(name, steps=1))
    other = "adafactor" if name != "adafactor" else "adamw"
    with pytest.raises(UserError, match=r"another recipe \(differs in: optimiser\)"):
        rewardsr.finetune(recipe(other, steps=2), resume=True)


# ---- options ----


def test_defaults_go_by_the_name_and_survive_the_runs_recipe(recipe) -> None:
    for name, rate in LEARNING_RATES.items():
        made = parse(Recipe, recipe(name), "test")
        assert (made.optimiser.learning_rate, made.optimiser.betas is None) == (rate, name == "adafactor")
        again = rewardsr.train.recipe.load_recipe(None, rewardsr.train.recipe.read_yaml(to_yaml(made), "test"), [])
        assert again == made
    assert parse(OptimiserRecipe, {"name": "prodigy", "learning_rate": 0.5}, "test").learning_rate == 0.5
    assert parse(OptimiserRecipe, {}, "test").learning_rate == 5e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adafactor", "betas": (0.9, 0.999)}, "adafactor has none"),
        ({"name": "prodigy", "betas": None}, "every other optimiser needs two"),
        ({"name": "sgd"}, "'name' is 'sgd'"),
        ({"name": ["adamw"]}, "'name' is"),
    ],
)
def test_options_without_a_use_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        parse(OptimiserRecipe, options, "test")


@pytest.mark.parametrize("name", sorted(optimisers.PACKAGES))
def test_an_absent_package_is_one_line_before_anything_is_loaded(name, recipe, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(optimisers, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=r"is not installed; pip install 'rewardsr\[optimisers\]'"):
        rewardsr.finetune(recipe(name) | {"base": "nowhere"})
    assert not (tmp_path / "run").exists()


def test_a_package_that_does_not_import_is_one_line(recipe, monkeypatch) -> None:
    setup = set_up(parse(Recipe, recipe("prodigy"), "test"))

    def broken(name: str) -> None:
        raise RuntimeError("no library\nhere")

    monkeypatch.setattr(optimisers.importlib, "import_module", broken)
    with pytest.raises(UserError, match="prodigyopt does not work here: RuntimeError: no library here"):
        make_optimiser(setup)


def test_prodigy_refuses_groups_with_rates_of_their_own(recipe) -> None:
    pytest.importorskip("prodigyopt")
    setup = set_up(parse(Recipe, recipe("prodigy"), "test"))
    (group,) = setup.method.trained
    halves = [dict(list(group.parameters.items())[start::2]) for start in (0, 1)]
    kind = type(group)
    setup.method.trained = [kind("a", halves[0]), kind("b", halves[1], learning_rate=0.5)]
    with pytest.raises(UserError, match=r"trainer 'gdpo' trains at 0\.5, 1 times the recipe's: choose adamw"):
        make_optimiser(setup)
    setup.method.trained = [kind("a", halves[0]), kind("b", halves[1], learning_rate=0.0)]
    step(setup, make_optimiser(setup), State())
