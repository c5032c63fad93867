"""Options can be found: in lists, READMEs, commented recipes and help, everywhere with a description."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import typer

from rewardsr import Recipe, cli, plugins
from rewardsr.catalogue import KINDS, options_of
from rewardsr.options import Options, describe
from rewardsr.train.recipe import load_recipe
from rewardsr.train.template import PRESETS, template
from tools.options import READMES, ROOT, written

EVERY = [(kind, name) for kind in KINDS for name in plugins.names(kind)]
ADAPTERS, TRAINERS = (plugins.names(kind) for kind in ("adapters", "trainers"))


@pytest.mark.parametrize(("kind", "name"), [*EVERY, ("rewards", "musiq")], ids=str)
def test_every_option_of_every_plugin_is_described(kind, name) -> None:
    for option in describe(options_of(kind, name)):
        assert option.description, option.name
        assert "typing" not in option.type and "<class" not in option.type, option


def test_every_key_of_a_recipe_is_described() -> None:
    def walk(model: type[Options], prefix: str = "") -> None:
        for name, entry in model.model_fields.items():
            kinds = [entry.annotation, *get_args(entry.annotation)]
            inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Options)]
            assert entry.description or inner, f"{prefix}{name}"
            for kind in inner:
                walk(kind, f"{prefix}{name}.")

    walk(Recipe)


def commands_of(group: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for name, command in sorted(group.commands.items()):
        inner = getattr(command, "commands", None)
        found += [((*path, name), command)] if inner is None else commands_of(command, (*path, name))
    return found


COMMANDS = commands_of(typer.main.get_command(cli.app))


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[" ".join(path) for path, _ in COMMANDS])
def test_every_option_of_every_command_is_described(path, command, commands) -> None:
    assert command.help
    for parameter in command.params:
        assert parameter.help, parameter.name
    short, whole = commands(*path, "-h"), commands(*path, "--help")
    assert short.code == 0 and short.out == whole.out
    for parameter in command.params:
        assert (parameter.metavar or parameter.opts[-1]) in short.out, parameter.name


def test_adapter_options_have_one_name(commands) -> None:
    for path, command in COMMANDS:
        options = {option for parameter in command.params for option in parameter.opts}
        assert ("--option" in options) == ("--adapter" in options and path != ("recipe",)), path


def test_help_is_grouped_and_knows_its_short_form(commands) -> None:
    answer = commands("-h")
    assert answer.code == 0 and answer.out == commands("--help").out
    panels = [line for line in answer.out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert panels == [f"{panel}:" for panel in cli.PANELS] + ["Options:"]
    assert "--install-completion" in answer.out
    assert "Which pipeline:" in commands("finetune", "-h").out


@pytest.mark.parametrize("name", READMES)
def test_the_tables_in_the_readmes_are_those_of_the_declarations(name) -> None:
    text = (ROOT / name).read_text()
    assert written(text) == text, "run python -m tools.options"


def test_every_built_in_adapter_and_trainer_has_its_table() -> None:
    for folder, kind, names in (("adapters", "adapters", ADAPTERS), ("rewardsr/trainers", "trainers", TRAINERS)):
        text = (ROOT / folder / "README.md").read_text()
        for name in names:
            assert f"<!-- options: {kind} {name} -->\n| option" in text


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_commented_recipe_is_one_with_every_key(adapter, trainer, tmp_path) -> None:
    for preset in (None, *PRESETS):
        path = tmp_path / "recipe.yaml"
        path.write_text(template(adapter, trainer, preset))
        recipe = load_recipe(str(path), {}, [])
        assert recipe.model_fields_set == set(Recipe.model_fields)
        for given, kind, name in (
            (recipe.adapter_options, "adapters", adapter),
            (recipe.trainer_options, "trainers", trainer),
        ):
            assert given.keys() == options_of(kind, name).model_fields.keys()
        assert recipe.data.model_fields_set == set(type(recipe.data).model_fields)
        keys = [line for line in path.read_text().splitlines() if line and "- {" not in line]
        for before, line in pairwise(keys):
            if not line.lstrip().startswith("#") and not line.endswith(":"):
                assert before.lstrip().startswith("#"), f"{line}: no comment before it"


def test_a_recipe_from_the_command_line_trains(commands, hq_folder, tiny_base, tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    answer = commands("recipe", "--preset", "cpu", "-o", path)
    assert answer.code == 0, answer.err
    where = ("--base", tiny_base, "--data", hq_folder, "--output", tmp_path / "run", "--steps", 1)
    answer = commands("finetune", path, *where, "--crop", 32, "--rank", 2, "--lr", 1e-4, "--option", "noise_t=200")
    assert answer.code == 0, answer.err
    made = load_recipe(str(tmp_path / "run" / "recipe.yaml"), {}, [])
    assert (made.data.crop, made.lora.rank, made.optimiser.learning_rate) == (32, 2, 1e-4)
    assert made.adapter_options["noise_t"] == 200
    before = path.read_text()
    assert "choose a new file" in commands("recipe", "-o", path).err and path.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("recipe", "--preset", "24g"), "did you mean '24gb'?"),
        (("recipe", "--trainer", "gdop"), "did you mean 'gdpo'?"),
        (("trainers", "rfrs"), "did you mean 'rfsr'?"),
        (("degradations", "bicubik"), "did you mean 'bicubic'?"),
        (("rewards", "psrn"), "did you mean 'psnr'?"),
        (
            (
                "finetune",
                "--base",
                "embedded",
                "--option",
                "noise=2",
                "--data",
                "x",
                "--output",
                "y",
                "--steps",
                "1",
                "--rewards",
                "psnr",
            ),
            "noise_t",
        ),
    ],
)
def test_a_near_miss_is_named(arguments, says, refused) -> None:
    assert says in refused(*arguments)


def test_lists_show_what_there_is(commands) -> None:
    for kind in KINDS:
        answer = commands(kind)
        assert answer.code == 0, answer.err
        assert all(name in answer.out for name in plugins.names(kind))
    assert "beta (float, above 0, default 5000.0): " in commands("trainers", "gdpo").out
    assert (
        "first.blur" in commands("degradations", "realesrgan").out
        or "kernel." in commands("degradations", "realesrgan").out
    )
    assert "has none" in commands("rewards", "psnr").out
