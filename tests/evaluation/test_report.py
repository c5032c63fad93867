"""Tables and pictures."""

import json
import math
from xml.etree import ElementTree

import pytest
import torch

from rewardsr.data.images import read_image
from rewardsr.errors import UserError
from rewardsr.evaluation.cast import CAST_HEADINGS, Cast, OffsetTest, cast_rows
from rewardsr.evaluation.comparison import Comparison
from rewardsr.evaluation.exports import as_csv, as_latex, as_markdown, worst_in_words
from rewardsr.evaluation.pictures import closeup, comparison_row, grid, shown, write_grid
from rewardsr.evaluation.report import HEADINGS, Evaluation, markdown, rows


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        images=("a.png", "b.png"),
        scores={
            "base": {"psnr": (20.0, 30.0), "a|b": (2000.0, 2000.0)},
            "tuned": {"psnr": (21.0, 30.0), "a|b": (1.0, 1.0)},
        },
        seed=7,
        draws_per_image=1,
        color_fix="adain",
    )


def test_rows(evaluation) -> None:
    assert rows(evaluation) == [
        ("reward", "base", "tuned", "difference [95 % interval]", "improved"),
        ("psnr", "25.0000", "25.5000", "+0.5000 [-5.8531, +6.8531]", "50 %"),  # t of one degree of freedom, 12.7062
        ("a|b", "2000.0", "1.0000", "-1999.0 [-1999.0, -1999.0]", "0 %"),
    ]


def test_one_image_has_no_interval() -> None:
    single = Evaluation(("a",), {"base": {"x": (0.0,)}, "tuned": {"x": (1.0,)}}, 0, 1, "none")
    assert rows(single)[1][3] == "+1.0000 [one image: none]"
    assert "1 image, 1 draw of" in str(single)


def test_markdown(evaluation) -> None:
    lines = markdown(evaluation).splitlines()
    assert lines[0] == "| reward | base | tuned | difference [95 % interval] | improved |"
    assert lines[1] == "| :--- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| psnr | 25.0000 | 25.5000 | +0.5000 [-5.8531, +6.8531] | 50 % |"
    assert lines[3].startswith(r"| a\|b |") and lines[4] == "" and "seed 7" in lines[5]


def test_text_is_aligned(evaluation) -> None:
    lines = str(evaluation).splitlines()
    assert len({len(line) for line in lines[:3]}) == 1 and len(lines) == 4
    assert lines[3].startswith("2 images, 1 draw of noise each, seed 7, colour fix adain")


def test_a_notebook_shows_a_table() -> None:
    single = Evaluation(("a",), {"base": {"<b>&x": (0.0,)}, "tuned": {"<b>&x": (1.0,)}}, 0, 1, "none")
    table = ElementTree.fromstring(single._repr_html_())
    assert [cell.text for cell in table.iter("th")] == list(rows(single)[0])
    assert [cell.text for cell in table.iter("td")] == list(rows(single)[1])
    assert table.find("caption").text.startswith("1 image, 1 draw")


@pytest.fixture
def several() -> Evaluation:
    """Three systems, one metric where lower is better, one that a system was trained on."""
    scores = {
        "base": {"psnr": (20.0, 22.0), "lpips": (-0.5, -0.25)},
        "A_1": {"psnr": (21.0, 23.0), "lpips": (-0.25, -0.25)},
        "bicubic": {"psnr": (19.0, 22.0), "lpips": (-0.75, -0.5)},
    }
    sets = {"base": {"fid": -30.0}, "A_1": {"fid": -20.0}, "bicubic": {"fid": -40.0}}
    about = {
        "negated": ("lpips", "fid"),
        "trained_on": ("psnr",),
        "margins": {"lpips": 0.05},
        "settings": {"a": 1},
        "weights": {"A_1": {"lora": "x"}},
    }
    return Evaluation(("a.png", "b.png"), scores, 0, 1, "none", sets=sets, **about)


def test_several_systems_are_compared_with_the_first(several) -> None:
    table = rows(several)
    assert table[0] == HEADINGS and [row[0] for row in table if not any(row[1:])] == ["trained on", "held out"]
    by_name = {(metric, row[1]): row[2:] for metric, place in (("psnr", 2), ("lpips", 6), ("fid", 9))
               for row in table[place : place + 3]}  # fmt: skip
    assert by_name["psnr", "base"] == ("21.0000", "", "")
    assert by_name["psnr", "A_1"] == ("22.0000", "+1.0000 [+1.0000, +1.0000]", "100 %")
    # Shown as the metric itself is: lower, and better on one image of two.
    assert by_name["lpips", "A_1"] == ("0.2500", "-0.1250 [-1.7133, +1.4633]", "50 %")
    assert by_name["fid", "bicubic"] == ("40.0000", "+10.0000 [one set: none]", "-")
    assert "of lpips, fid lower" in str(several) and "against base" in str(several)
    assert several.worst("psnr", 1, "bicubic") == [("a.png", -1.0)]
    content = json.loads(several.to_json())
    assert Evaluation.from_dict(content) == several
    assert content["systems"]["bicubic"]["lpips"]["worst"] == ["a.png", "b.png"]


def test_one_system_alone_has_a_table() -> None:
    alone = Evaluation(("a",), {"bicubic": {"x": (1.0,)}}, 0, 1, "none")
    assert rows(alone) == [HEADINGS, ("x", "bicubic", "1.0000", "", "")]
    assert Evaluation.from_dict(json.loads(alone.to_json())) == alone and worst_in_words(alone) == []
    with pytest.raises(ValueError, match="only system"):
        assert alone.rewards


def test_spreadsheets_and_papers(several) -> None:
    lines = as_csv(several).splitlines()
    assert lines[0] == "image,system,psnr,lpips" and lines[2] == "a.png,A_1,21.0,0.25" and len(lines) == 7
    table = as_latex(several).splitlines()
    assert table[0] == r"\begin{tabular}{lrrr}" and table[-1] == r"\end{tabular}"
    assert table[2] == r" & \multicolumn{1}{c}{trained on} & \multicolumn{2}{c}{held out} \\"
    assert table[4] == r"System & psnr $\uparrow$ & lpips $\downarrow$ & fid $\downarrow$ \\"
    assert r"A\_1 & \textbf{22.0000} & \textbf{0.2500} & \textbf{20.0000} \\" in table
    page = as_markdown(several)
    assert "Worst images of bicubic against base:" in page and "| lpips | a.png | +0.2500 |" in page
    assert worst_in_words(several)[0] == "worst images of A_1 by lpips: b.png +0.0000, a.png -0.2500"


def test_a_file_that_holds_no_evaluation(tmp_path) -> None:
    for content in ("", "[]", '{"unfinished": true, "settings": {}}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match="holds no evaluation, or one that was not finished"):
            Evaluation.read(tmp_path / "x.json")


def offset_test(gain: float, alone: float, without: float, low: float) -> OffsetTest:
    base, tuned = (10.0, 20.0), (10.0 + gain, 20.0 + gain)
    return OffsetTest(
        Comparison(base, tuned, low, 2 * gain - low),
        Comparison(base, (10.0 + alone, 20.0 + alone), alone - 1, alone + 1),
        Comparison(base, (10.0 + without, 20.0 + without), without - 1, without + 1),
        Comparison((10.0 + alone, 20.0 + alone), tuned, math.nan, math.nan),
    )


TESTS = {
    "cast": offset_test(1.0, 0.75, 0.125, 0.5),
    "half": offset_test(1.0, 0.5, 0.5, 0.5),  # no more than a half
    "doubtful": offset_test(1.0, 0.75, 0.125, 0.0),
    "lower": offset_test(-1.0, -0.75, -0.125, -1.5),
    "equal": offset_test(0.0, 0.25, 0.0, 0.0),
}


def with_cast(*names: str) -> Evaluation:
    tests = {name: TESTS[name] for name in names}
    scores = {
        "base": {name: test.gain.base for name, test in tests.items()},
        "tuned": {name: test.gain.tuned for name, test in tests.items()},
    }
    casts = {"tuned": Cast((0.5, -1.5), "the 2 images compared", tests)}
    return Evaluation(("a", "b"), scores, 0, 1, "none", casts)


def test_an_offset_that_gives_more_than_half_of_a_gain_is_a_cast() -> None:
    assert [test.mostly for test in TESTS.values()] == [True, False, False, False, False]
    assert [test.share for test in TESTS.values()] == [0.75, 0.5, 0.75, 0.75, None]
    said = with_cast(*TESTS).cast.sentences
    assert said == [
        "mostly a global cast: of cast's +1.0000, one constant offset of the latents, the same for every image and "
        "without LoRA, gives +0.7500 (75 %); without it the LoRA gives +0.1250 [-0.8750, +1.1250]",
        "not mostly a global cast: of half's +1.0000, one constant offset of the latents, the same for every image and "
        "without LoRA, gives +0.5000 (50 %); without it the LoRA gives +0.5000 [-0.5000, +1.5000]",
    ]
    assert with_cast("doubtful", "lower").cast.sentences == [
        "no reward has a gain (an interval above 0) that an offset could explain"
    ]
    assert with_cast("lower").cast.sentence("lower").startswith("lower has no gain")


def test_the_cast_has_a_table_of_its_own() -> None:
    evaluation = with_cast(*TESTS)
    table = cast_rows(evaluation.cast)
    assert table[0] == CAST_HEADINGS and [row[0] for row in table[1:]] == list(TESTS)
    assert table[1] == ("cast", "+0.7500 [-0.2500, +1.7500]", "75 %", "+0.1250 [-0.8750, +1.1250]")
    assert [row[2] for row in table[1:]] == ["75 %", "50 %", "-", "-", "-"]
    said = str(evaluation).split("\n\n")[1]
    assert all(len(line) <= 80 for line in said.splitlines())
    assert "2 numbers, measured on the 2 images compared" in " ".join(said.split())
    lines = markdown(evaluation).splitlines()
    assert f"| {' | '.join(CAST_HEADINGS)} |" in lines and evaluation.cast.sentences[0] in lines
    tables = list(ElementTree.fromstring(f"<all>{evaluation._repr_html_()}</all>"))
    assert [len(list(table.iter("tr"))) for table in tables] == [6, 6]
    assert "mostly a global cast" in tables[1].find("caption").text


def test_the_cast_goes_through_json() -> None:
    evaluation = with_cast("cast", "equal")
    content = json.loads(evaluation.to_json())
    cast = content["casts"]["tuned"]
    assert cast["rewards"]["equal"]["share"] is None and cast["offset"] == [0.5, -1.5]
    assert cast["rewards"]["cast"]["beyond"]["interval"] == [None, None]
    again = Evaluation.from_dict(content)
    assert again.to_dict() == content | {"casts": {"tuned": again.cast.to_dict()}}
    assert again.cast.rewards["equal"].gain.differences == TESTS["equal"].gain.differences


def test_grid_places_every_image(tmp_path) -> None:
    lq, base, tuned, hq = (torch.full((3, *size), value) for size, value in zip(
        [(4, 6), (16, 24), (16, 24), (16, 24)], (0.2, 0.4, 0.6, 0.8), strict=True
    ))  # fmt: skip
    row = comparison_row(lq, base, tuned, hq, name="a.png")
    assert [caption for caption, _ in row] == ["a.png LQ", "base", "tuned", "HQ"]
    assert row[0][1].shape == (3, 16, 24)
    picture = grid([row, row[:2]])
    assert picture.shape == (3, 2 * (14 + 16) + 4, 4 * 24 + 3 * 4)
    for column, value in enumerate((0.2, 0.4, 0.6, 0.8)):
        part = picture[:, 14:30, 28 * column : 28 * column + 24]
        assert torch.allclose(part, torch.full_like(part, value), atol=1e-6)
    assert torch.equal(picture[:, 48:, :24], picture[:, 14:30, :24])
    assert float(picture[:, 34:, 56:].min()) == 1  # nothing below the missing cells
    assert float(picture[:, :14, :24].min()) < 0.5  # a caption
    path = write_grid([row], tmp_path / "grid.png")
    assert read_image(path).shape == (3, 30, 108)


def test_grid_of_unequal_sizes_and_sides() -> None:
    big = torch.rand(3, 40, 50)
    picture = grid([[("big", shown(big, 20)), ("small", shown(torch.zeros(3, 5, 5), 20))]])
    assert picture.shape == (3, 14 + 20, 20 + 4 + 5)
    assert torch.equal(picture[:, 14:, :20], (big[:, 10:30, 15:35] * 255).round() / 255)
    assert grid([[("", torch.zeros(3, 1, 1))]]).shape == (3, 15, 1)


def test_captions_of_any_script() -> None:
    grid([[("图像.png – é", torch.zeros(3, 8, 80))]])


def test_a_closeup_shows_the_detail_of_hq_in_every_image() -> None:
    hq = torch.full((3, 40, 60), 0.5)
    hq[:, 21:29:2, 33:45] = 1.0  # the only detail: stripes
    other = torch.arange(60).expand(3, 40, 60) / 60
    (name, left), (_, right) = closeup([("base", other), ("HQ", hq)], side=16, zoom=3)
    assert name == "base" and left.shape == right.shape == (3, 48, 48)
    small = right[:, ::3, ::3].float() / 255
    assert torch.equal(small.repeat_interleave(3, 1).repeat_interleave(3, 2) * 255, right.float())
    assert float((small == 1).float().sum()) == 3 * 4 * 12, "all stripes are in the window"
    column = round(float(left[0, 0, 0]) / 255 * 60)
    assert any(torch.equal(shown(hq)[:, top : top + 16, column : column + 16], right[:, ::3, ::3]) for top in range(25))
    whole = closeup([("HQ", torch.zeros(3, 8, 8))], side=16, zoom=2)
    assert whole[0][1].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="one size"):
        closeup([("LQ", torch.zeros(3, 4, 4)), ("HQ", torch.zeros(3, 8, 8))], side=4, zoom=1)


def test_grid_refuses(tmp_path) -> None:
    for cells in ([], [[]]):
        with pytest.raises(ValueError, match="nothing to show"):
            grid(cells)
    with pytest.raises(ValueError, match="expected an image"):
        grid([[("a", torch.zeros(1, 3, 4, 4))]])
    with pytest.raises(UserError, match=r"\.png"):
        write_grid([[("a", torch.zeros(3, 4, 4))]], tmp_path / "a.jpg")
