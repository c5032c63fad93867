"""Plug-ins of another package: found by name, and when they are broken, one line that breaks nobody else."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import stranger_package

import rewardsr
from rewardsr import Recipe, UserError, catalogue, load_adapter, plugins
from rewardsr.options import parse
from rewardsr.pipelines import adapter_class
from rewardsr.testing import check_adapter
from rewardsr.train.prepare import set_up

GOOD = {
    "adapters": "Doubling",
    "trainers": "Gentle",
    "rewards": "Luma",
    "taggers": "Means",
    "degradations": "Thin",
    "captioners": "Captions",
}
BUILT_IN = ("osediff", "sd_upscaler", "seesr", "stablesr")


@pytest.fixture
def installed(tmp_path_factory, monkeypatch) -> None:
    """A distribution named stranger, with a good and a broken plug-in of every group, as pip would leave it."""
    site = tmp_path_factory.mktemp("site")
    info = site / "stranger-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.2\n")
    groups = (
        f"[rewardsr.{group}]\ngood = stranger_package:{name}\nbroken = broken_package:Thing\n"
        for group, name in GOOD.items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(site)


@pytest.fixture
def recipe(tiny_base, hq_folder, tmp_path):
    """A short run of an adapter of the stranger."""

    def make(adapter: str, crop: int = 32) -> Recipe:
        content = {
            "adapter": adapter,
            "base": str(tiny_base),
            "rewards": [{"name": "detail"}],
            "trainer_options": {"group_size": 2},
            "data": {"train": str(hq_folder), "validation": str(hq_folder), "crop": crop},
            "output": str(tmp_path / "run"),
            "steps": 1,
            "device": "cpu",
        }
        return parse(Recipe, content, "recipe")

    return make


@pytest.mark.parametrize("group", GOOD)
def test_a_broken_plugin_is_one_line_and_breaks_nobody_else(group, installed) -> None:
    assert {"good", "broken"} <= set(plugins.names(group))
    assert plugins.resolve(group, "good") is getattr(stranger_package, GOOD[group])
    with pytest.raises(UserError) as caught:
        plugins.resolve(group, "broken")
    assert str(caught.value) == (
        f"{group[:-1]} 'broken' of the package stranger: importing broken_package failed: "
        "ModuleNotFoundError: No module named 'not_installed_anywhere'"
    )
    for name in plugins.names(group):
        assert name == "broken" or plugins.resolve(group, name) is not None


def test_an_entry_point_without_its_object(monkeypatch, tmp_path) -> None:
    info = tmp_path / "other-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[rewardsr.adapters]\ngone = stranger_package:Gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'gone' of the package other: module stranger_package has no 'Gone'"):
        adapter_class("gone")


def test_lists_tell_of_broken_plugins_and_go_on(installed, commands) -> None:
    for command in ("adapters", "rewards"):
        answer = commands(command)
        assert answer.code == 0, answer.err
        assert "does not load" in answer.out and "good" in answer.out
    assert [name for name, text in catalogue.entries("adapters") if "does not load" in text] == ["broken"]


@pytest.mark.parametrize(
    "points", ["[rewardsr.adapters]\nodd = no module at all\n", "[rewardsr.adapters]\nnonsense\n", "\xff"]
)
def test_damaged_metadata_of_a_stranger_breaks_nobody(points, tmp_path, monkeypatch, commands) -> None:
    info = tmp_path / "odd-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1\n")
    (info / "entry_points.txt").write_bytes(points.encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    assert set(BUILT_IN) <= set(plugins.names("adapters"))
    assert adapter_class("osediff").name == "osediff"
    for command in (("adapters",), ("rewards",), ("adapters", "osediff"), ("doctor",), ("finetune", "--help")):
        answer = commands(*command)
        assert answer.code == 0, answer.err


def test_a_name_is_looked_at_before_anything_is_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "traced.py").write_text("open('trace', 'w')\nName = 1\n")
    monkeypatch.chdir(tmp_path)
    for name in (
        "traced:",
        ":Name",
        "traced:Name.",
        "traced:a b",
        " traced:Name",
        "traced.:Name",
        "traced:Name:x",
        ".",
    ):
        with pytest.raises(UserError, match=r"expected module:Name|unknown adapter"):
            plugins.resolve("adapters", name)
    assert not (tmp_path / "trace").exists()


def test_a_broken_plugin_that_is_asked_for_ends_in_one_line(installed, refused, tiny_base, hq_folder, tmp_path) -> None:
    for option in ("--adapter", "--trainer"):
        line = refused.finetune(tiny_base, hq_folder, tmp_path / "run", option, "broken")
        assert "'broken' of the package stranger: importing broken_package failed" in line


def test_wrap_passes_over_broken_plugins(installed, tiny_base) -> None:
    plain = load_adapter("osediff", tiny_base)
    parts = {"unet": plain.unet, "vae": plain.vae, "text_encoder": plain._text_encoder, "tokenizer": plain._tokenizer}
    scheduler = SimpleNamespace(config={"beta_schedule": "scaled_linear"})
    pipe = SimpleNamespace(**parts, scheduler=scheduler)
    assert rewardsr.wrap(pipe).name == "osediff"
    assert rewardsr.wrap(SimpleNamespace(**parts, scheduler=scheduler, doubles=True), "good").scale == 2
    with pytest.raises(UserError, match=r"known: good, osediff, .*'broken' of the package stranger: importing"):
        rewardsr.wrap(object())


@pytest.mark.parametrize(
    "option", [("--adapter", "stranger_package:Loose"), ("--trainer", "stranger_package:LooseTrainer")]
)
def test_options_that_are_not_strict_are_refused(option, refused, tiny_base, hq_folder, tmp_path) -> None:
    line = refused.finetune(tiny_base, hq_folder, tmp_path / "run", *option)
    assert "its Options must be a subclass of rewardsr.Options, got <class 'dict'>" in line


# ---- what is only known of the loaded pipeline ----


def test_an_adapter_that_knows_its_scale_when_it_is_loaded(installed, recipe, tiny_base) -> None:
    check_adapter(load_adapter("good", tiny_base))
    setup = set_up(recipe("good", crop=34))
    for images in (setup.data, setup.validation):
        assert images is not None
    batch = setup.data.batch(0, [0])
    assert batch.hq.shape == (1, 3, 34, 34) and batch.lq.shape == (1, 3, 17, 17)
    with pytest.raises(UserError, match="multiple of the scale"):
        set_up(recipe("good", crop=33))


def test_a_scale_that_is_promised_must_hold(recipe) -> None:
    with pytest.raises(UserError, match="has scale 2, but its options said 4"):
        set_up(recipe("stranger_package:Promising"))


# ---- options, told ----


def test_the_options_of_an_adapter_are_listed(commands, refused) -> None:
    answer = commands("adapters", "osediff")
    assert answer.code == 0, answer.err
    for part in ("noise_t (int or null, default null): ", "scale (int, 1 to 64, default 4): ", "tile_overlap"):
        assert part in answer.out
    assert "did you mean 'osediff'?" in refused("adapters", "osedif")


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_readme_has_the_options_that_there_are(name) -> None:
    table = catalogue.table(catalogue.options_of("adapters", name))
    assert table in (Path(__file__).parents[1] / "adapters" / "README.md").read_text(), table
    assert all(row.count(" | ") == 3 and not row.endswith("|  |") for row in table.splitlines())
