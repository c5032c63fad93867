"""Recipes: what is refused, with which hint, and what the text of a value is read as."""

import os
import time

import pytest
import yaml

from rewardsr.errors import UserError
from rewardsr.train.recipe import (
    FREE_ON_RESUME,
    LARGEST,
    Recipe,
    assignments_of,
    differences,
    load_recipe,
    parse,
    parse_rewards,
    to_yaml,
)
from rewardsr.trainers.gdpo import GDPOOptions

LEAST = "base: b\nrewards: [{name: psnr}]\ndata: {train: photos}\noutput: run\nsteps: 3\n"


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe of the least keys and more text, and reads it."""

    def read(more: str = "", *assignments: str, least: str = LEAST, **overrides) -> Recipe:
        path = tmp_path / "recipe.yaml"
        path.write_text(least + more)
        return load_recipe(str(path), overrides, list(assignments))

    return read


@pytest.mark.parametrize(
    ("more", "key", "nearest"),
    [
        ("stepps: 3\n", "stepps", "steps"),
        ("optimiser: {learnig_rate: 1.0e-4}\n", "optimiser.learnig_rate", "learning_rate"),
        ("lora: {rnak: 4}\n", "lora.rnak", "rank"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(recipe, more, key, nearest) -> None:
    with pytest.raises(UserError, match=f"unknown key '{key}': did you mean '{nearest}'"):
        recipe(more)


def test_an_unknown_key_in_a_list_or_two_sections_deep_is_refused_with_the_nearest_name(recipe) -> None:
    with pytest.raises(UserError, match=r"unknown key 'rewards.0.wieght': did you mean 'weight'"):
        recipe(least=LEAST.replace("name: psnr", "name: psnr, wieght: 2"))
    with pytest.raises(UserError, match=r"unknown key 'data.crp': did you mean 'crop'"):
        recipe(least=LEAST.replace("train: photos", "train: photos, crp: 32"))


def test_an_unknown_key_that_is_near_nothing_lists_what_there_is(recipe) -> None:
    with pytest.raises(UserError, match=r"unknown key 'lora.xyz': known: rank, alpha, init"):
        recipe("lora: {xyz: 1}\n")


def test_unknown_trainer_options_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match=r"trainer_options: unknown key 'group_sise': did you mean 'group_size'"):
        parse(GDPOOptions, {"group_sise": 4}, "trainer_options")
    with pytest.raises(UserError, match=r"trainer_options: 'preference' is 'papr': input should be 'paper' or 'cond"):
        parse(GDPOOptions, {"preference": "papr"}, "trainer_options")
    with pytest.raises(UserError, match="'group_size' is 1"):
        parse(GDPOOptions, {"group_size": 1}, "trainer_options")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=5e-4", 5e-4),
        ("a.b=-1E3", -1e3),
        ("a.b=1.e2", 100.0),
        ("a.b=7", 7),
        ("a.b=true", True),
        ("a.b=[1, 2.5, 3e-1, x]", [1, 2.5, 0.3, "x"]),
        ("a.b=null", None),
        ("a.b=", None),
        ("a.b={c: 1e-2}", {"c": 0.01}),
        ("a.b=text=with=equals", "text=with=equals"),
        ("a.b='5e-4'", "5e-4"),
        ("a.b=e4", "e4"),
        ("a.b=module:Name", "module:Name"),
    ],
)
def test_values_of_set_are_read_as_yaml_with_numbers_as_people_write_them(text, value) -> None:
    found = assignments_of([text], "--set")
    assert found == {"a.b": value}
    assert type(found["a.b"]) is type(value)


@pytest.mark.parametrize("text", ["steps", "=3", " =3"])
def test_set_without_key_or_value_is_refused(text) -> None:
    with pytest.raises(UserError, match="expected key=value"):
        assignments_of([text], "--set")


def test_set_reaches_nested_keys_and_comes_last(recipe) -> None:
    read = recipe("", "optimiser.learning_rate=5e-4", "steps=9", "lora.rank=2", steps=5)
    assert (read.optimiser.learning_rate, read.steps, read.lora.rank) == (5e-4, 9, 2)
    assert recipe("", steps=5).steps == 5
    assert recipe("", steps=None).steps == 3
    with pytest.raises(UserError, match=r"'steps.more': 'steps' is a value, not a section"):
        recipe("", "steps.more=1")
    with pytest.raises(UserError, match=r"unknown key 'optimiser.learning_rat': did you mean 'learning_rate'"):
        recipe("", "optimiser.learning_rat=1")


def test_set_reaches_into_lists(recipe) -> None:
    two = LEAST.replace("{name: psnr}", "{name: psnr}, {name: ssim, weight: 3}")
    read = recipe("", "rewards.0.weight=2", "rewards.1.name=detail", "rewards.0.options.weights=x.pth", least=two)
    assert [(entry.name, entry.weight) for entry in read.rewards] == [("psnr", 2.0), ("detail", 3.0)]
    assert read.rewards[0].options == {"weights": "x.pth"}
    by_option = load_recipe(
        None, {**yaml.safe_load(LEAST), "rewards": parse_rewards("psnr=0.5,ssim")}, ["rewards.1.weight=0"]
    )
    assert [entry.weight for entry in by_option.rewards] == [0.5, 0.0]
    for part in ("2", "-1", "x", "1e0", "\u0661", "9" * 5000):
        with pytest.raises(UserError, match=r"is not in the list, which has 0 to 1"):
            recipe("", f"rewards.{part}.weight=2", least=two)
    with pytest.raises(UserError, match=r"'log_with.0': '0' is not in the list, which has nothing"):
        recipe("log_with: []\n", "log_with.0=wandb")
    for key in ("", ".", "a..b", ".a", "rewards.", "rewards. .weight"):
        with pytest.raises(UserError, match="expected key=value"):
            recipe("", f"{key}=1")


@pytest.mark.parametrize(
    "text",
    [
        *("seed: yes", "steps: true", "lora: {alpha: on}", "seed: 18446744073709551616", "seed: -9223372036854775809"),
        *("lora: {rank: 1.0e+8}", "lora: {alpha: .inf}", "optimiser: {learning_rate: 1e400}", "steps: 1e9"),
        *("optimiser: {betas: [0.9, 1]}", "optimiser: {betas: [-0.1, 0.9]}", "optimiser: {eps: 1e-50}"),
        *("optimiser: {weight_decay: 1e30}", "optimiser: {clip: .nan}", "rewards: [{name: psnr, weight: .inf}]"),
        *("batch_size: 99999999", "accumulate: 99999999", "data: {train: x, crop: 99999999}", "validate_every: 1e30"),
        *("lora: {init: ~nosuchuser/x}", 'output: "\\0"', f"output: {'x' * 300}", "data: {train: ''}"),
    ],
)
def test_numbers_and_paths_without_sense(recipe, text) -> None:
    section = text.partition(":")[0]
    kept = "".join(line + "\n" for line in LEAST.splitlines() if not line.startswith(f"{section}:"))
    with pytest.raises(UserError, match=f"'{section}") as caught:
        recipe(text + "\n", least=kept)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_seeds_are_those_that_torch_takes(recipe, seed) -> None:
    import torch

    torch.Generator().manual_seed(recipe(f"seed: {seed}\n").seed)


def test_a_recipe_that_does_not_end_is_not_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(UserError, match=f"recipe '.*{name}.yaml' is a pipe or a device"):
            load_recipe(str(tmp_path / f"{name}.yaml"), {}, [])
    (tmp_path / "large.yaml").write_text("#" * (LARGEST + 1))
    with pytest.raises(UserError, match=r"is larger than 100,000 bytes"):
        load_recipe(str(tmp_path / "large.yaml"), {}, [])


def test_aliases_do_not_multiply(recipe) -> None:
    levels = "".join(
        f"  - &{one} [{','.join([f'*{below}'] * 9)}]\n" for below, one in zip("abcdefg", "bcdefgh", strict=True)
    )
    began = time.monotonic()
    with pytest.raises(UserError, match="holds more than 10,000 values") as caught:
        recipe(f"adapter_options: {{x: &a [1,2,3]}}\nlog_with:\n{levels}")
    assert len(str(caught.value)) < 300 and time.monotonic() - began < 2
    assert recipe("trainer_options: &o {beta: 3}\nadapter_options: *o\n").adapter_options == {"beta": 3}
    assert recipe("trainer_options: &o {beta: 3}\nadapter_options: {<<: *o, x: 1}\n").adapter_options == {
        "beta": 3,
        "x": 1,
    }


def test_files_that_are_no_recipes_are_refused(recipe, tmp_path) -> None:
    with pytest.raises(UserError, match=r"recipe '.*nowhere.yaml': No such file"):
        load_recipe(str(tmp_path / "nowhere.yaml"), {}, [])
    with pytest.raises(UserError, match="is not valid YAML"):
        recipe("data: [unclosed\n")
    with pytest.raises(UserError, match="is not a mapping"):
        recipe(least="- a\n- b\n")
    with pytest.raises(UserError, match="is not a mapping"):
        recipe(least="")
    with pytest.raises(UserError, match=r"the key 'steps' occurs twice, again in line 6"):
        recipe("steps: 4\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a text file"):
        load_recipe(str(tmp_path / "binary.yaml"), {}, [])
    with pytest.raises(UserError, match="is not valid YAML"):  # a tag that would build an object
        recipe("seed: !!python/object/apply:os.getpid []\n")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("batch_size: 0\n", "'batch_size' is 0"),
        ("optimiser: {schedule: linear}\n", "'optimiser.schedule' is 'linear'"),
        ("device: tpu\n", "'device' is 'tpu'"),
        ("seed: many\n", "'seed' is 'many'"),
        ("log_with: [mlflow]\n", "'log_with.0' is 'mlflow'"),
    ],
)
def test_wrong_values_are_named(recipe, more, message) -> None:
    with pytest.raises(UserError, match=message):
        recipe(more)


def test_missing_keys_and_twofold_rewards_are_named(recipe) -> None:
    with pytest.raises(UserError, match=r"'data.train' is missing"):
        recipe(least=LEAST.replace("train: photos", "validation: photos"))
    with pytest.raises(UserError, match="a name occurs twice"):
        recipe(least=LEAST.replace("{name: psnr}", "{name: psnr}, {name: psnr}"))


def test_rewards_of_the_command_line() -> None:
    assert parse_rewards("psnr=0.5, detail") == [{"name": "psnr", "weight": 0.5}, {"name": "detail", "weight": 1.0}]
    assert parse_rewards("mine:Reward=2") == [{"name": "mine:Reward", "weight": 2.0}]
    with pytest.raises(UserError, match="the weight is not a number"):
        parse_rewards("psnr=much")


def test_the_resolved_recipe_reads_back_equal(recipe) -> None:
    read = recipe("optimiser: {eps: 1e-12, learning_rate: 3e-5}\n", "data.crop=64")
    content = yaml.safe_load(to_yaml(read))
    assert content["lora"]["rank"] == read.lora.rank  # defaults are written out
    again = recipe(least=to_yaml(read))
    assert again == read
    assert differences(read, again) == []


def test_what_a_resumed_run_may_change(recipe) -> None:
    read = recipe()
    assert differences(read, recipe("", "data.crop=4", "lora.rank=8", "seed=3")) == ["data", "lora", "seed"]
    assert differences(read, recipe("", "data.train=elsewhere")) == [], "what the images are is asked of them"
    free = {"output": "elsewhere", "steps": 4, "checkpoint_every": 7, "keep_checkpoints": 9, "log_with": ["wandb"]}
    assert set(free) < FREE_ON_RESUME
    assert differences(read, recipe(**free)) == []
