"""Tables and pictures."""

import math
from xml.etree import ElementTree

import pytest
import torch

from rewardsr.data.images import read_image
from rewardsr.errors import UserError
from rewardsr.evaluation.pictures import comparison_row, grid, shown, write_grid
from rewardsr.evaluation.report import HEADINGS, Comparison, Evaluation, markdown, rows


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


def test_grid_refuses(tmp_path) -> None:
    for cells in ([], [[]]):
        with pytest.raises(ValueError, match="nothing to show"):
            grid(cells)
    with pytest.raises(ValueError, match="expected an image"):
        grid([[("a", torch.zeros(1, 3, 4, 4))]])
    with pytest.raises(UserError, match=r"\.png"):
        write_grid([[("a", torch.zeros(3, 4, 4))]], tmp_path / "a.jpg")
