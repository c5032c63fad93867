"""Tables and pictures."""

import json
import math
from xml.etree import ElementTree

import pytest
import torch

from rewardsr.data.images import read_image
from rewardsr.errors import UserError
from rewardsr.evaluation.pictures import closeup, comparison_row, grid, shown, write_grid
from rewardsr.evaluation.report import (
    CAST_HEADINGS,
    HEADINGS,
    Cast,
    Comparison,
    Evaluation,
    OffsetTest,
    cast_rows,
    markdown,
    rows,
)


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(
        images=("a.png", "b.png"),
        rewards={
            "psnr": Comparison((20.0, 30.0), (21.0, 30.0), 0.0, 1.0),
            "a|b": Comparison((2000.0, 2000.0), (1.0, 2.0), -1999.0, -1998.0),
        },
        seed=7,
        draws_per_image=1,
        color_fix="adain",
    )


def test_rows(evaluation) -> None:
    assert rows(evaluation) == [
        HEADINGS,
        ("psnr", "25.0000", "25.5000", "+0.5000 [+0.0000, +1.0000]", "50 %"),
        ("a|b", "2000.0", "1.5000", "-1998.5 [-1999.0, -1998.0]", "0 %"),
    ]


def test_one_image_has_no_interval() -> None:
    single = Evaluation(("a",), {"x": Comparison((0.0,), (1.0,), math.nan, math.nan)}, 0, 1, "none")
    assert rows(single)[1][3] == "+1.0000 [one image: none]"
    assert "1 image, 1 draw of" in str(single)


def test_markdown(evaluation) -> None:
    lines = markdown(evaluation).splitlines()
    assert lines[0] == "| reward | base | tuned | difference [95 % interval] | improved |"
    assert lines[1] == "| :--- | ---: | ---: | ---: | ---: |"
    assert lines[2] == "| psnr | 25.0000 | 25.5000 | +0.5000 [+0.0000, +1.0000] | 50 % |"
    assert lines[3].startswith(r"| a\|b |") and lines[4] == "" and "seed 7" in lines[5]


def test_text_is_aligned(evaluation) -> None:
    lines = str(evaluation).splitlines()
    assert len({len(line) for line in lines[:3]}) == 1 and len(lines) == 4
    assert lines[3].startswith("2 images, 1 draw of noise each, seed 7, colour fix adain")


def test_a_notebook_shows_a_table() -> None:
    single = Evaluation(("a",), {"<b>&x": Comparison((0.0,), (1.0,), math.nan, math.nan)}, 0, 1, "none")
    table = ElementTree.fromstring(single._repr_html_())
    assert [cell.text for cell in table.iter("th")] == list(HEADINGS)
    assert [cell.text for cell in table.iter("td")] == list(rows(single)[1])
    assert table.find("caption").text.startswith("1 image, 1 draw")


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
    gains = {name: test.gain for name, test in tests.items()}
    return Evaluation(("a", "b"), gains, 0, 1, "none", Cast((0.5, -1.5), "the 2 images compared", tests))


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
    assert content["cast"]["rewards"]["cast"]["mostly_a_cast"] and content["cast"]["offset"] == [0.5, -1.5]
    assert content["cast"]["rewards"]["equal"]["share"] is None
    assert content["cast"]["rewards"]["cast"]["beyond"]["interval"] == [None, None]
    again = Evaluation.from_dict(content)
    assert again.to_json() == evaluation.to_json() and again.cast.rewards["equal"].gain == TESTS["equal"].gain


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
