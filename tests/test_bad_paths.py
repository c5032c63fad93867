"""Paths that are none, wherever a command takes one: one line, nothing read without end, nothing written."""

import os
from pathlib import Path

import pytest

from rewardsr import console
from rewardsr.pipelines import open_run, weighted

QUICK = ("--rewards", "psnr", "--steps", 1, "--device", "cpu", "--set", "data.crop=32")
OPTIONS = ("--set", "adapter_options.noise_t=250", "--set", "trainer_options.group_size=2")

# By the place that the value of a line goes to; TINY and HQ are a pipeline and a folder of images.
PLACES = {
    "recipe": ("finetune", "VALUE"),
    "finetune base": ("finetune", *QUICK, *OPTIONS, "--base", "VALUE", "--data", "HQ", "--output", "out"),
    "finetune data": ("finetune", *QUICK, *OPTIONS, "--base", "TINY", "--data", "VALUE", "--output", "out"),
    "validation": (
        *("finetune", *QUICK, *OPTIONS, "--base", "TINY", "--data", "HQ"),
        *("--validation", "VALUE", "--output", "out"),
    ),
    "finetune output": ("finetune", *QUICK, *OPTIONS, "--base", "TINY", "--data", "no/where", "--output", "VALUE"),
    "weights": (
        *("finetune", *QUICK, *OPTIONS, "--base", "TINY", "--data", "HQ", "--output", "out"),
        *("--set", "adapter_options.weights='VALUE'"),
    ),
    "reward weights": (
        *("finetune", *QUICK, *OPTIONS, "--base", "TINY", "--data", "HQ", "--output", "out"),
        *("--set", "rewards.0.name=imagereward", "--set", "rewards.0.options.weights='VALUE'"),
    ),
    "images": ("upscale", "VALUE", "-o", "out", "--base", "TINY"),
    "upscale output": ("upscale", "no/where.png", "-o", "VALUE", "--base", "TINY"),
    "run": ("upscale", "HQ", "-o", "out", "--run", "VALUE"),
    "LoRA": ("upscale", "HQ", "-o", "out", "--base", "TINY", "--lora", "VALUE"),
    "evaluate": ("evaluate", "VALUE", "--lora", "no/where", "--base", "TINY"),
    "export output": ("export", "VALUE", "--format", "kohya", "--lora", "no/where", "--base", "TINY"),
    "import": ("import", "lora", "VALUE", "out", "--base", "TINY"),
    "import output": ("import", "lora", "no/where", "VALUE", "--base", "TINY"),
    "import stablesr": ("import", "stablesr", "VALUE", "out"),
    "push": ("push", "VALUE", "a/b", "--dry-run"),
    "pull output": ("pull", "no/--such", "-o", "VALUE"),
}
ODD = {
    "empty": "",
    "nobody's home": "~nosuchuser/x",
    "long": "x" * 300,
    "deep": "a/" * 2500,
    "no UTF-8": "\udcff",
    "a file": "file.txt",
    "below a file": "file.txt/x",
    "pipe": "pipe",
    "endless": "endless",
    "loop": "loop",
    "steers": "a\x1b[31m\u202eb",
}


@pytest.fixture
def here(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("here")
    (folder / "file.txt").write_text("x")
    os.mkfifo(folder / "pipe")
    (folder / "endless").symlink_to("/dev/zero")
    (folder / "loop").symlink_to("loop")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_odd_paths_are_refused_in_one_line(refused, here, tiny_base, hq_folder, place) -> None:
    before = sorted(os.listdir(here))
    for value in ODD.values():
        named = {"TINY": str(tiny_base), "HQ": str(hq_folder)}
        line = refused(*(named.get(part, str(part).replace("VALUE", value)) for part in PLACES[place]))
        assert line.rstrip("\n").isprintable() and len(line) < 520, line
        assert sorted(os.listdir(here)) == before


def test_a_home_folder_is_meant_by_a_tilde(commands, monkeypatch, tiny_base, hq_folder, tmp_path) -> None:
    for name, folder in (("base", tiny_base), ("images", hq_folder)):
        (tmp_path / name).symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    answer = commands.finetune("~/base", "~/images", "~/runs/one", "--validation", "~/images")
    assert answer.code == 0, answer.err
    assert (tmp_path / "runs" / "one" / "recipe.yaml").is_file()
    again = ("--set", "lora.init=~/runs/one", "--set", "lora.rank=4", "--dry-run")
    assert commands.finetune("~/base", "~/images", "~/runs/two", *again).code == 0
    for command in (
        ("upscale", "~/images", "-o", "~/out", "--run", "~/runs/one"),
        ("export", "~/merged", "--format", "merged", "--lora", "~/runs/one:0.5", "--base", "~/base"),
        ("upscale", "~/images/000.png", "-o", "~/other", "--base", "~/base", "--option", "weights=~/merged"),
    ):
        answer = commands(*command, *(() if command[0] == "export" else ("--device", "cpu")))
        assert answer.code == 0, answer.err
    assert not list(work.iterdir()), "no folder called ~"


def test_a_colon_is_part_of_a_name_where_the_path_exists(commands, hq_folder, tiny_base, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("exp", "exp:2", "2025-01-01_12:30", "with:colons:in:it")
    for name, seed in zip(names, range(len(names)), strict=True):
        answer = commands.finetune(tiny_base, hq_folder, name, "--seed", seed, "--set", "optimiser.learning_rate=0.01")
        assert answer.code == 0, answer.err

    def pictures(*source: str) -> list[bytes]:
        answer = commands("upscale", hq_folder, *source, "-o", "out", "--overwrite", "--device", "cpu")
        assert answer.code == 0, answer.err
        return [path.read_bytes() for path in sorted(Path("out").glob("*.png"))]

    plain = ("--base", str(tiny_base), "--option", "noise_t=250")
    for name in names:
        assert pictures("--run", name) == pictures(*plain, "--lora", name)
        assert pictures(*plain, "--lora", f"{name}:1.0") == pictures("--run", name)
    assert pictures("--run", "exp:2") != pictures(*plain, "--lora", "exp:2.0")
    refused = commands("upscale", hq_folder, "--run", "exp:3", "-o", "out")
    assert refused.code == 2 and "'exp:3/recipe.yaml'" in refused.err


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("user/a:0.7", "user/a", 0.7),
        ("C:\\x", "C:\\x", 1.0),
        ("C:\\x:0.5", "C:\\x", 0.5),
        ("a:b", "a:b", 1.0),
        ("a:-1e-1", "a", -0.1),
        (":0.5", ":0.5", 1.0),
    ],
)
def test_weights_behind_a_colon(text, source, weight) -> None:
    assert weighted(text) == (source, weight)


def test_a_run_whose_base_has_moved(commands, hq_folder, tiny_base, tmp_path) -> None:
    base = tmp_path / "base"
    base.symlink_to(tiny_base)
    assert commands.finetune(base, hq_folder, tmp_path / "run").code == 0
    base.unlink()
    answer = commands("upscale", hq_folder, "--run", tmp_path / "run", "-o", tmp_path / "out")
    assert answer.code == 2 and "base '" in answer.err
    adapter, _ = open_run(str(tmp_path / "run"), base=str(tiny_base), device="cpu")
    assert adapter.noise_t == 250


def test_errors_of_the_disk_are_one_line_wherever_they_come_from(commands, monkeypatch) -> None:
    from rewardsr import doctor

    for number in console.PLACE_ERRORS:

        def examine(number: int = number) -> list[str]:
            raise OSError(number, os.strerror(number), "x" * 5000 + "\x1b[31m")

        monkeypatch.setattr(doctor, "examine", examine)
        answer = commands("doctor")
        assert answer.code == 2 and answer.err.count("\n") == 1 and len(answer.err) < 520 and "\x1b" not in answer.err
