"""Texts in metadata.jsonl, as Hugging Face's ImageFolder has them; suffixes; samples whose prompt is left empty."""

from pathlib import Path

import pytest

from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import Data, open_data
from rewardsr.data.sidecars import resolve_prompts
from rewardsr.errors import UserError
from rewardsr.testing import write_images
from rewardsr.train.recipe import ProtocolRecipe

LIGHT = Light(LightOptions(), 4)


def opened(folder: Path, prompts: str = "metadata", column: str = "text", **options) -> Data:
    known = {"scale": 4, "crop": 16, "degradation": LIGHT, "prompts": prompts, "caption_column": column}
    return open_data(folder, **(known | options))


def prompts(folder: Path, **options) -> list[str | None]:
    return [item.prompt for item in opened(folder, **options).items]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_images(tmp_path / "data", 3, 24)
    write_images(tmp_path / "data" / "sub", 2, 24)
    (tmp_path / "data" / "metadata.jsonl").write_text(
        '{"file_name": "000.png", "text": "a  cat\\n", "score": 1}\n\n{"text": null, "file_name": "001.png"}\r\n'
        '{"file_name": "002.png", "text": "\u00e9"}\n{"file_name": "sub/000.png", "text": "from above"}\n'
        '{"file_name": "gone.png", "text": "no image"}\n'
    )
    (tmp_path / "data" / "sub" / "metadata.jsonl").write_text('{"file_name": "001.png", "text": "from beside"}')
    return tmp_path / "data"


def test_texts_by_file_name(folder) -> None:
    assert prompts(folder) == ["a cat", "", "\u00e9", "from above", "from beside"]
    own = [folder / f"00{number}.png" for number in range(3)]
    assert resolve_prompts(own, "metadata") == ["a cat", "", "\u00e9"]  # as upscaling files asks


def test_texts_of_pairs_are_those_of_hq(tmp_path) -> None:
    write_images(tmp_path / "gt", 1, 32)
    write_images(tmp_path / "lq", 1, 8)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "gt/000.png", "text": "a", "tags": "b"}')
    assert prompts(tmp_path) == ["a"]
    assert prompts(tmp_path, column="tags") == ["b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"file_name": "000.png", "text": "a"}', r"4 of 5 images have no line in a metadata\.jsonl .*\(001\.png, 002"),
        ("[1]", "line 1: expected an object with file_name"),
        ('{"file_name": 3, "text": "a"}', "line 1: expected an object with file_name"),
        ('\n{"file_name": "000.png",', "line 2 is not JSON"),
        (
            '{"file_name": "000.png", "caption": "a"}',
            r"line 1 has no 'text' \(caption, file_name\): set data\.caption_column",
        ),
        ('{"file_name": "000.png", "text": ["a"]}', "line 1: 'text' is no text"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_metadata_that_does_not_work(content, message, folder) -> None:
    (folder / "sub" / "metadata.jsonl").unlink()
    (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        opened(folder)


def test_many_empty_texts_are_said(folder, caplog) -> None:
    opened(folder)
    assert not caplog.messages  # one of five
    (folder / "sub" / "metadata.jsonl").write_text('{"file_name": "001.png", "text": " "}')
    opened(folder)
    assert caplog.messages == [f"'{folder}': 2 of 5 prompts are empty"]


def test_a_suffix_follows_each_text(folder) -> None:
    assert prompts(folder, suffix="sharp, 8k")[:2] == ["a cat, sharp, 8k", "sharp, 8k"]
    assert set(prompts(folder, prompts="a photo", suffix="sharp")) == {"a photo, sharp"}


def test_the_protocol_keeps_what_goes_together() -> None:
    whole = ProtocolRecipe(
        prompts="captioner", captioner="a:B", captioner_options={"model": "c"}, prompt_suffix="sharp"
    )
    assert whole.prompted(None) == whole == whole.prompted("captioner")
    fixed = whole.prompted("a photo")
    assert (fixed.captioner, fixed.captioner_options, fixed.prompt_suffix) == (None, {}, "sharp")
    assert whole.prompted("adapter").prompt_suffix == ""


def test_dropout_is_drawn_for_each_sample(folder) -> None:
    whole = opened(folder, prompts="a photo", prompt_dropout=0.3).batch(5, range(400)).prompts
    assert set(whole) == {"", "a photo"} and 90 <= whole.count("") <= 150
    parts = opened(folder, prompts="a photo", prompt_dropout=0.3, workers=2)
    assert parts.batch(5, range(200, 400, 2)).prompts == whole[200:400:2]
    parts.close()
    assert opened(folder, prompts="a photo", prompt_dropout=0.3).batch(6, range(400)).prompts != whole
    more = opened(folder, prompts="a photo", prompt_dropout=0.6).batch(5, range(400)).prompts
    assert all(not text for text, before in zip(more, whole, strict=True) if not before)


def test_dropout_touches_nothing_else(folder) -> None:
    plain, dropped = (opened(folder, prompts="adapter", prompt_dropout=share).batch(0, range(9)) for share in (0, 0.5))
    assert plain.prompts is None and set(dropped.prompts) == {None, ""}
    assert plain.paths == dropped.paths and bool((plain.lq == dropped.lq).all())
    assert all(batch.prompts == ("a photo",) for batch in opened(folder, "a photo", prompt_dropout=1.0).validation())
