"""One setting at several values."""

from xml.etree import ElementTree

import pytest
import torch
from _support import Commands

from rewardsr import load_adapter, lora
from rewardsr.data.images import read_image
from rewardsr.evaluation.report import Evaluation
from rewardsr.evaluation.sweep import curves

SVG = "{http://www.w3.org/2000/svg}"
CPU = ("--device", "cpu", "--limit", 2)


@pytest.fixture(scope="module")
def tuned(tiny_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    lora.attach(adapter, rank=2)
    for key, parameter in lora.parameters(adapter).items():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(key)))
    return lora.save(adapter, folder).parent


def read(folder) -> Evaluation:
    return Evaluation.read(folder / "evaluation.json")


def test_strengths_against_metrics(commands: Commands, tuned, tiny_base, hq_folder, tmp_path) -> None:
    base = ("--base", tiny_base, "--option", "noise_t=250")
    command = ("sweep", hq_folder, "--lora", tuned, *base, *CPU, "-o", tmp_path / "x")
    answer = commands(*command, "--over", "strength=0,0.5,1")
    assert answer.code == 0, answer.err
    found = read(tmp_path / "x")
    assert list(found.scores) == ["strength=0", "strength=0.5", "strength=1"]
    assert "strength=0.5" in answer.out and "curve.svg" in answer.out
    plain = commands("evaluate", hq_folder, "--lora", f"x={tuned}", *base, *CPU, "-o", tmp_path / "y")
    assert plain.code == 0, plain.err
    two = read(tmp_path / "y")
    assert (found.scores["strength=0"], found.scores["strength=1"]) == (two.scores["base"], two.scores["x"])
    assert found.scores["strength=0.5"] not in two.scores.values()
    picture = ElementTree.fromstring((tmp_path / "x" / "curve.svg").read_text())
    assert len(picture.findall(f"{SVG}g")) == 2 and len(list(picture.iter(f"{SVG}circle"))) == 6
    assert read_image(tmp_path / "x" / "grid.png").shape == (3, 2 * (14 + 96) + 4, 5 * 96 + 4 * 4)
    before = (tmp_path / "x" / "curve.svg").read_bytes(), (tmp_path / "x" / "grid.png").read_bytes()
    assert commands(*command, "--over", "strength=0,0.5,1").code == 0
    assert before == ((tmp_path / "x" / "curve.svg").read_bytes(), (tmp_path / "x" / "grid.png").read_bytes())


def test_options_of_the_adapter(commands: Commands, tiny_base, hq_folder, tmp_path) -> None:
    answer = commands("sweep", hq_folder, "--base", tiny_base, "--over", "noise_t=50,250", *CPU, "-o", tmp_path / "x")
    assert answer.code == 0, answer.err
    found = read(tmp_path / "x")
    assert list(found.scores) == ["noise_t=50", "noise_t=250"]
    assert found.scores["noise_t=50"] != found.scores["noise_t=250"]


def test_the_curve_shows_means_where_they_are() -> None:
    scores = {f"t={value}": {"psnr": (mean, mean + 1)} for value, mean in (("0", 20.0), ("1", 22.0), ("4", 21.0))}
    found = Evaluation(("a", "b"), scores, 0, 1, "none")
    picture = ElementTree.fromstring(curves(found))
    (line,) = picture.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.attrib["points"].split())
    assert (x1 - x0) * 3 == pytest.approx(x2 - x1, abs=0.2), "values that are numbers are spaced as such"
    assert y1 < y2 < y0 and y0 - y1 == pytest.approx(2 * (y2 - y1), abs=0.2)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert "psnr (higher is better)" in texts and {"20.5000", "22.5000", "0", "1", "4"} <= set(texts)


def test_refused(refused, tiny_base, hq_folder, tmp_path) -> None:
    def said(*arguments: object) -> str:
        return refused("sweep", hq_folder, "--base", tiny_base, "-o", tmp_path / "x", *arguments)

    assert "a strength is that of a LoRA" in said()
    assert "expected SETTING=VALUE" in said("--over", "strength")
    assert "each once" in said("--over", "noise_t=1,1")
    assert "two values" in said("--over", "noise_t=1")
    assert "noise_tt" in said("--over", "noise_tt=1,2")
