"""Images in tables of the package `datasets`: saved ones, files that it reads, and ids that are in no cache."""

import io
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import Data, open_data
from rewardsr.data.images import encode_png, read_image
from rewardsr.data.rows import Row, Table
from rewardsr.data.survey import survey
from rewardsr.errors import UserError
from rewardsr.testing import write_images
from rewardsr.train.recipe import SourceRecipe

LIGHT = Light(LightOptions(), 4)


def picture(number: int, kind: str = "PNG", side: int = 24) -> bytes:
    image = torch.rand(3, side, side + number, generator=torch.Generator().manual_seed(number))
    if kind == "PNG":
        return encode_png(image)
    buffer = io.BytesIO()
    Image.open(io.BytesIO(encode_png(image))).save(buffer, kind)
    return buffer.getvalue()


def table(count: int = 4, **columns: list) -> datasets.Dataset:
    kinds = ["PNG", "JPEG", "TIFF", "WEBP"]
    images = [{"bytes": picture(number, kinds[number % 4]), "path": None} for number in range(count)]
    texts = [f"image {number}" for number in range(count)]
    made = datasets.Dataset.from_dict({"image": images, "text": texts, "label": [0] * count, **columns})
    return made.cast_column("image", datasets.Image())


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory) -> None:
    """What `datasets` makes of files goes to a folder of this test, and it says nothing."""
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")


@pytest.fixture
def saved(tmp_path) -> Path:
    table().save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def opened(dataset: Path | str, prompts: str = "adapter", caption_column: str = "text", **source) -> Data:
    made = SourceRecipe(dataset=str(dataset), **source)
    texts = {"prompts": prompts, "caption_column": caption_column}
    return open_data([made], scale=4, crop=16, degradation=LIGHT, workers=2, **texts)


def test_rows_are_images_like_files(saved) -> None:
    data = opened(saved, prompts="metadata")
    assert data.said == f"4 HQ images in '{saved}'" and [item.size for item in data.items] == [
        (24, 24 + number) for number in range(4)
    ]
    for number, batch in enumerate(data.validation()):
        expected = torch.from_numpy(
            np.array(Image.open(io.BytesIO(picture(number, ["PNG", "JPEG", "TIFF", "WEBP"][number]))))
        )
        width = (24 + number) // 4 * 4
        left = number // 2
        assert torch.equal(
            (batch.hq[0] * 255).round().to(torch.uint8), expected.permute(2, 0, 1)[:, :, left : left + width]
        )
        assert batch.prompts == (f"image {number}",) and batch.paths == (f"{saved} row {number}",)
    plain = open_data([SourceRecipe(dataset=str(saved))], scale=4, crop=16, degradation=LIGHT)
    assert torch.equal(plain.batch(0, range(8)).lq, data.batch(0, range(8)).lq)
    data.check()
    assert len(data) == 4
    data.close()


def test_lq_images_in_a_table(saved) -> None:
    data = opened(saved, layout="lq")
    assert not data.has_hq and data.batch(0, [0]).lq.shape == (1, 3, 4, 4)


def test_the_kinds_of_folders_that_datasets_reads(tmp_path) -> None:
    whole = datasets.DatasetDict({"train": table(4), "test": table(2)})
    whole.save_to_disk(tmp_path / "dict")
    assert len(opened(tmp_path / "dict")) == 4 and len(opened(tmp_path / "dict", split="test")) == 2
    (tmp_path / "parquet").mkdir()
    table(3).to_parquet(tmp_path / "parquet" / "train.parquet")
    assert len(opened(tmp_path / "parquet")) == 3
    images = write_images(tmp_path / "images", 2, 24)
    (images / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": "a"}\n{"file_name": "001.png", "text": ""}'
    )
    data = opened(images, prompts="metadata")
    assert [item.prompt for item in data.items] == ["a", ""]
    assert torch.equal(next(data.validation()).hq[0], read_image(images / "000.png"))


def test_other_columns(tmp_path) -> None:
    table(2).rename_columns({"image": "hr", "text": "caption"}).save_to_disk(tmp_path)
    data = opened(tmp_path, prompts="metadata", image_column="hr", caption_column="caption")
    assert [item.prompt for item in data.items] == ["image 0", "image 1"]
    with pytest.raises(UserError, match="no column 'image' of images: set image_column to one of hr"):
        opened(tmp_path)
    with pytest.raises(
        UserError, match=r"no column 'text' of texts .*set data\.caption_column to one of its columns \(hr, cap"
    ):
        opened(tmp_path, prompts="metadata", image_column="hr")
    with pytest.raises(UserError, match="images have no files beside them: prompts 'metadata'"):
        opened(tmp_path, prompts="sidecar", image_column="hr")
    assert {item.prompt for item in opened(tmp_path, prompts="a photo", image_column="hr").items} == {"a photo"}


def test_the_identity_is_of_content_not_of_place(saved, tmp_path) -> None:
    table().save_to_disk(tmp_path / "again")
    table(text=["other"] * 4).save_to_disk(tmp_path / "texts")
    table(3).save_to_disk(tmp_path / "fewer")
    same = opened(saved, prompts="metadata").identity()
    assert same == opened(tmp_path / "again", prompts="metadata").identity()
    assert same not in {opened(tmp_path / name, prompts="metadata").identity() for name in ("texts", "fewer")}


def test_rows_without_an_image_or_with_a_damaged_one_are_unreadable(tmp_path) -> None:
    gone = write_images(tmp_path / "gone", 1, 24) / "000.png"
    contents = [(picture(0), None), (b"no image", None), (None, str(gone)), (None, None), (picture(1)[:-40], None)]
    images = [{"bytes": content, "path": path} for content, path in contents]
    made = datasets.Dataset.from_dict({"image": images}).cast_column("image", datasets.Image())
    made.to_parquet(tmp_path / "parquet" / "train.parquet")
    gone.unlink()
    (gone.parent / "train.parquet").write_bytes((tmp_path / "parquet" / "train.parquet").read_bytes())
    with pytest.raises(UserError, match=r"of 5 images are unreadable.*row 1': not an image"):
        opened(gone.parent)
    source = SourceRecipe(dataset=str(gone.parent))
    data = open_data([source], scale=4, crop=16, degradation=LIGHT, max_unreadable=0.9)
    data.check()
    assert [item.hq.number for item in data.items if item.hq.number != 2] == [0]
    found = survey(source, crop=16)
    assert (found.usable, len(found.unreadable), found.captions) == (len(data), 5 - len(data), "none")


def test_a_survey_of_a_table(saved, commands) -> None:
    answer = commands("data", "check", saved, "--dataset", "--crop", 16)
    assert answer.code == 0 and answer.out.splitlines()[-1].split() == ["usable", "4"], answer.err
    found = survey(SourceRecipe(dataset=str(saved)), crop=16)
    assert (found.usable, found.captions, found.no_caption, found.problems) == (4, "metadata", [], [])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"dataset": "nobody/nothing"},
            "data set 'nobody/nothing' is no folder here and in no cache, and there is no c",
        ),
        (
            {"dataset": "{saved}", "split": "test"},
            "split 'test', cannot be loaded: KeyError: \"it is the split 'train'",
        ),
        ({"dataset": "{saved}", "config": "other"}, "a saved data set has no configurations: leave config out"),
        ({"dataset": "{empty}"}, "split 'train', cannot be loaded: "),
    ],
)
def test_data_sets_that_cannot_be_had_are_refused_at_once(source, message, saved, tmp_path, contacted) -> None:
    (tmp_path / "empty").mkdir()
    places = {"saved": saved, "empty": tmp_path / "empty"}
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        Table(SourceRecipe(**{key: value.format(**places) for key, value in source.items()}))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10 and not contacted


def test_without_the_package_there_is_one_line(saved, tmp_path) -> None:
    script = (
        "import sys; sys.modules['datasets'] = None\n"
        "from rewardsr.data.rows import Table\nfrom rewardsr.train.recipe import SourceRecipe\n"
        f"Table(SourceRecipe(dataset={str(saved)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "UserError: data sets need the package datasets: pip install 'rewardsr[datasets]'" in done.stderr


def test_rows_of_one_table_are_told_apart(saved) -> None:
    one = Table(SourceRecipe(dataset=str(saved)))
    assert Row(one, 1) == Row(one, 1) != Row(one, 2) and len({Row(one, 1), Row(one, 1)}) == 1


def test_a_run_on_a_table(commands, tiny_base, saved, tmp_path) -> None:
    more = ("--set", f"data.train={{dataset: {saved}}}", "--set", "data.prompts=metadata", "--set", "data.crop=16")
    answer = commands.finetune(tiny_base, "unused", tmp_path / "run", *more)
    assert answer.code == 0 and f"training on 4 HQ images in '{saved}'" in answer.out, answer.err
    answer = commands.finetune(tiny_base, "unused", tmp_path / "run", *more, "--steps", 3, "--resume")
    assert answer.code == 0, answer.err
