"""Whatever a recipe, an assignment or the environment says: a recipe, or one short line of a UserError."""

import os
from typing import Any
from unittest import mock

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rewardsr import pipelines, plugins
from rewardsr.data.degrade.contract import degradation_options
from rewardsr.errors import UserError
from rewardsr.options import Options, parse
from rewardsr.rewards import build
from rewardsr.train.processes import COUNTERS, ENGINES, check_environment
from rewardsr.train.recipe import DegradationRecipe, Recipe, assignments_of, load_recipe, parse_rewards, to_yaml

LEAST: dict[str, Any] = {
    "base": "b",
    "rewards": [{"name": "psnr"}],
    "data": {"train": "photos"},
    "output": "run",
    "steps": 3,
}


def tried(call) -> Any:
    """What a call gives; None where it is refused as it should be."""
    try:
        return call()
    except UserError as error:
        line = str(error)
        assert line and len(line) < 500 and line.isprintable(), line
    return None


# ---- what people, editors and enemies write ----

ODD_NUMBERS = [
    *(0, -1, -0.0, 1, True, False, 2**31, 2**63, 2**64, 10**20, -(10**30), 10**4000),
    *(1e308, -1e308, 5e-324, 1e-50, float("inf"), float("-inf"), float("nan")),
]
ODD_TEXTS = [
    *("", " ", "~", "~nosuchuser/x", "x" * 300, "a/" * 3000, "\0", "a\x1b[31mb", "a\nb", "\u202eabc", "\ud800"),
    *("train:", ":x", "a:b:c", "a..b:C", " torch:hub", "torch:hub ", "\uff1a", "C:\\x", "..", "/", "-1", "1e400"),
    *("adapter", "sidecar", "captioner", "cuda", "light", "bicubic", "musiq", "iqa:", "iqa:nothing", "2026-13-45"),
]
SCALARS = (
    st.none()
    | st.sampled_from([*ODD_NUMBERS, *ODD_TEXTS])
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.dates()
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | SCALARS, inner, max_size=3),
    max_leaves=8,
)


def fields(model: type[Options] = Recipe, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every field of a model."""
    found = []
    for name, entry in model.model_fields.items():
        found.append((*prefix, name))
        kind = entry.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            found += fields(kind, (*prefix, name))
    return found


FIELDS = fields() + [("rewards", "0", key) for key in ("name", "weight", "options")]

YAML_TEXTS = [
    *("steps: 2026-13-45", "seed: !!int abc", "seed: !!int", "x: !!binary ü", "x: !!bool maybe", "x: !!float"),
    *("[" * 500, "[" * 500 + "]" * 500, "{a: " * 300, "- " * 400, "? [a]\n: b", "1: 2", "null: 1", "a: 1\na: 2"),
    *("x: \0", 'x: "\\ud800"', "---\n---", "a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "<<: {steps: 3}"),
    *("<<: [1]", "<<: x", "x: !!timestamp soon", "x: !!python/name:os.system", "!!set {a, b}", "x: !!omap [a: 1]"),
    *("x: !!pairs [a]", "%TAG ! x", "\ufeffsteps: 3", "x: *nowhere", "\t- x", "@", "`", "x: " + "9" * 5000),
    *("x: 0x" + "f" * 5000, "x: 1:" + "59:" * 400 + "0", "rewards: [{name: 0x" + "f" * 5000 + "}]"),
]


def growing(first: str, link: str, last: str) -> str:
    """Nine levels, each of which holds nine times the one below."""
    pairs = zip("abcdefgh", "bcdefghi", strict=True)
    levels = [f"{name}: &{name} {link % ','.join([f'*{below}'] * 9)}" for below, name in pairs]
    return "\n".join([f"a: &a {first}", *levels, last])


# ---- the tests ----


@settings(max_examples=300)
@given(
    text=st.sampled_from(YAML_TEXTS)
    | st.text(max_size=60)
    | st.text(alphabet="abc:&*[]{}!<,-?|>%@\"'# \n\t0.e~", max_size=60)
)
@example(text=growing("[x,x,x]", "[%s]", "steps: *i"))
@example(text=growing("{k: 1}", "{<<: [%s]}", "adapter_options: *i"))
@example(text="a: " + "x" * 200_000)
def test_any_text_is_a_recipe_or_one_line(tmp_path_factory, text) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, errors="surrogatepass")
    assert tried(lambda: load_recipe(str(path), {}, [])) is None, "nothing of these has all the keys of one"


@settings(max_examples=600)
@given(
    field=st.sampled_from(FIELDS),
    value=VALUES,
    several=st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), max_size=2),
)
def test_any_value_in_any_field(field, value, several) -> None:
    content = yaml.safe_load(yaml.safe_dump(LEAST))
    for path, new in [(field, value), *several]:
        section: Any = content
        for part in path[:-1]:
            inner = section[int(part)] if isinstance(section, list) and section else {}
            inner = section.setdefault(part, {}) if isinstance(section, dict) else inner
            section = inner
        if isinstance(section, dict):
            section[path[-1]] = new
    recipe = tried(lambda: parse(Recipe, content, "recipe"))
    if recipe is not None:
        tried(lambda: to_yaml(recipe))
        tried(lambda: degradation_options(recipe.data.degradation))


@settings(max_examples=300)
@given(
    key=st.sampled_from([".".join(path) for path in FIELDS])
    | st.sampled_from(["", ".", "a..b", "rewards.5.weight", "rewards.-1", "rewards.x.weight", "rewards.0", "steps.x"])
    | st.sampled_from(
        ["rewards.00.weight", "rewards.\u0661.weight", "rewards." + "9" * 5000, "data", "\0", "adapter_options.x"]
    )
    | st.text(max_size=12),
    value=st.sampled_from(YAML_TEXTS) | st.text(max_size=20) | SCALARS.map(str),
    more=st.sampled_from(["psnr=1", "psnr", "=", ",", "a=inf", "psnr=1e999", "psnr=\0", "x" * 5000, "a=b=c", "\x1b=1"]),
)
def test_any_assignment(key, value, more) -> None:
    recipe = tried(lambda: load_recipe(None, {**LEAST, "rewards": [{"name": "psnr"}]}, [f"{key}={value}"]))
    assert recipe is None or isinstance(recipe, Recipe)
    tried(lambda: assignments_of([f"{key}{value}"], "--option"))
    tried(lambda: parse_rewards(more + value))
    tried(lambda: pipelines.weighted(f"{key}:{value}"))


MODELS = {
    f"{kind}: {name}": declared
    for kind in ("adapters", "trainers", "degradations", "rewards")
    for name in plugins.names(kind)
    if (declared := getattr(plugins.resolve(kind, name), "Options", None)) not in (None, Options)
}


@settings(max_examples=400)
@given(name=st.sampled_from(sorted(MODELS)), value=VALUES, place=st.integers(0, 30), other=VALUES)
def test_any_value_of_any_option(name, value, place, other) -> None:
    names = list(MODELS[name].model_fields)
    content = {names[place % len(names)]: value, names[(place * 7 + 1) % len(names)]: other}
    tried(lambda: parse(MODELS[name], content, f"options of {name}"))
    if name.startswith("degradations"):
        content.pop("name", None)
        tried(lambda: degradation_options(parse(DegradationRecipe, {"name": "light", **content}, "degradation")))


def test_an_integer_that_python_does_not_write_out() -> None:
    for path in FIELDS[:3]:
        assert tried(lambda path=path: parse(Recipe, {**LEAST, path[0]: 10**5000}, "recipe")) is None


@settings(max_examples=100)
@given(
    name=st.sampled_from(ODD_TEXTS) | st.text(max_size=12),
    kind=st.sampled_from(["adapters", "trainers", "taggers", "captioners"]),
)
def test_any_name_of_a_plugin(name, kind) -> None:
    tried(lambda: plugins.resolve(kind, name))
    with plugins.registered_only("the run 'a/b'"):
        tried(lambda: plugins.resolve(kind, name))
        tried(lambda: build(name))


VARIABLES = [*COUNTERS, *ENGINES, "MASTER_ADDR", "MASTER_PORT"]
SAID = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=200)
@given(
    said=st.dictionaries(st.sampled_from(VARIABLES), SAID | st.sampled_from(["", "0", "1", "2", "-1", "1e3", "\u0661"]))
)
def test_any_environment(said) -> None:
    with mock.patch.dict(os.environ, said):
        tried(check_environment)
        tried(lambda: pipelines._local_rank(2))
