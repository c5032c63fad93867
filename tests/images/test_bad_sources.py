"""Images that a run cannot use: one line, before any network is loaded, and nothing written or asked for."""

import pytest
import torch

from rewardsr.data.images import write_image
from rewardsr.testing import write_images


@pytest.fixture
def places(tmp_path) -> dict[str, str]:
    """Folders and lists that do not work, by what is wrong with them."""
    small = write_images(tmp_path / "small", 2, 24)
    (tmp_path / "missing.txt").write_text("small/000.png\nsmall/none.png\n")
    (tmp_path / "empty.txt").write_text("")
    write_images(tmp_path / "alone" / "gt", 2, 32)
    write_images(tmp_path / "alone" / "lq", 1, 8)
    write_image(torch.rand(3, 32, 32), tmp_path / "uneven" / "gt" / "0.png")
    write_image(torch.rand(3, 9, 8), tmp_path / "uneven" / "lq" / "0.png")
    only = write_images(tmp_path / "only" / "lq", 2, 8).parent
    broken = write_images(tmp_path / "broken", 2, 48)
    (broken / "001.png").write_bytes(b"no image")
    captioned = write_images(tmp_path / "captioned", 2, 48)
    (captioned / "metadata.jsonl").write_text('{"file_name": "000.png", "text": "a"}')
    lists = {name: str(tmp_path / f"{name}.txt") for name in ("missing", "empty")}
    folders = {name: str(tmp_path / name) for name in ("alone", "uneven")}
    return (
        lists | folders | {"small": str(small), "only": str(only), "broken": str(broken), "captioned": str(captioned)}
    )


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "small",
            (),
            "as large as the crop of 32: 000.png (24x24), 001.png (24x24); lower data.crop, or set data.too_",
        ),
        ("missing", (), "1 of 2 files in the list"),
        ("empty", (), "is empty: a path of an image in each line is expected"),
        ("alone", (), "1 images in "),
        ("uneven", (), "1 of 1 pairs do not fit scale 4 (height x width): 0.png is 32x32 for an LQ image of 9x8"),
        ("only", (), "reward psnr, reward detail: needs HQ images, and data.train has 2 LQ images in"),
        ("broken", (), "1 of 2 images are unreadable, and data.max_unreadable allows 0: cannot read"),
        ("captioned", ("data.prompts=metadata",), "1 of 2 images have no line in a metadata.jsonl"),
        ("captioned", ("data.prompts=sidecar",), "2 of 2 images have no prompt file"),
        (
            "small",
            ("data.train={dataset: user/nothing}",),
            "is no folder here and in no cache, and there is no connectio",
        ),
        ("small", ("data.train=[{path: x, probability: 0.3}]",), "a probability of each source, or of none"),
    ],
)
def test_one_line_says_what_is_wrong(name, more, message, places, refused, tiny_base, tmp_path) -> None:
    assigned = [part for text in more for part in ("--set", text)]
    assert message in refused.finetune(tiny_base, places[name], tmp_path / "run", *assigned)
