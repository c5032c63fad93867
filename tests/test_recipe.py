"""Recipes: what is refused, with which hint, and what the text of a value is read as."""

import pytest
import yaml

from rewardsr.errors import UserError
from rewardsr.train.recipe import (
    FREE_ON_RESUME,
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
