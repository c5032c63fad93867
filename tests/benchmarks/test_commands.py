"""The benchmarks' command lines run, and keep what they measured."""

import importlib
import re

import card
import gdpo_step
import growth
import pytest


def run(script, monkeypatch, tmp_path, *options: str) -> list[list[str]]:
    """Cells of the rows that a command left in its file."""
    output = tmp_path / "rows.md"
    line = ("benchmark", "--size", "tiny", "--device", "cpu", "--steps", "1", "--output", str(output), *options)
    monkeypatch.setattr("sys.argv", list(line))
    script.main(tmp_path)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.read_text().splitlines() if "|" in line]


@pytest.mark.parametrize("name", [name for name, command, _ in card.PARTS if command[0] != "-m"])
def test_what_a_card_is_asked_for_can_be_asked(name, monkeypatch) -> None:
    script, *options = next(command for part, command, _ in card.PARTS if part == name)
    monkeypatch.setattr("sys.argv", [script, *options])
    assert importlib.import_module(script.removesuffix(".py")).arguments().device == "cuda"


@pytest.mark.parametrize(
    "options",
    [("--form", "paper", "shared"), ("--trainer", "rfsr"), ("--trainer", "rfsr", "--adapter", "seesr")],
    ids=["gdpo", "rfsr", "seesr"],
)
def test_beside_the_released_step(options, monkeypatch, tmp_path) -> None:
    more = ("--against", "released", "--sampler-steps", "5", "--rollout", "none")
    if "rfsr" in options:
        more += ("--no-count",)  # which takes longer than all else
    rows = run(gdpo_step, monkeypatch, tmp_path, *options, *more)
    forms = 1 if options == ("--trainer", "rfsr") else 2
    found = {name: [row for row in rows if row[0] == name] for name in ("ours", "released", "ours / released")}
    assert {name: len(of) for name, of in found.items()} == dict.fromkeys(found, forms)
    for ours, theirs, ratio in zip(*found.values(), strict=True):
        for column in (1, 4, 5):  # seconds, working memory, memory in all
            assert float(ours[column]) > 0
            share = float(ours[column]) / float(theirs[column])
            assert abs(float(ratio[column]) - share) < 0.1 * share, "small numbers are rounded"


def test_growth(monkeypatch, tmp_path) -> None:
    rows = run(growth, monkeypatch, tmp_path, "--axis", "group", "upscale", "--crop", "32")
    first = [row[0] for row in rows if re.fullmatch(r"\d+", row[0])]
    assert first == [*["2", "4", "6", "8", "12"], *["32", "48", "64", "96", "128"] * 2]
    group = [float(row[3]) for row in rows if len(row) == 5 and row[0] in ("2", "12")]
    assert group[1] > 3 * group[0], "memory of six times the outputs"
