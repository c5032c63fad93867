"""Captioners: prompts that a plug-in writes from the images."""

import pytest
import strangers
import torch

from rewardsr.data.captions import Captions
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import Data, open_data
from rewardsr.errors import UserError
from rewardsr.options import Options

LIGHT = Light(LightOptions(), 4)


def opened(folder, name: str = "strangers:shade", **options) -> Data:
    known = {"scale": 4, "crop": 16, "degradation": LIGHT, "prompts": "captioner", "captions": Captions(name)}
    return open_data(folder, **(known | options))


@pytest.mark.parametrize("name", ["strangers:shade", "strangers:Shades"])
def test_a_caption_belongs_to_its_image_whatever_the_batch(hq_folder, name) -> None:
    batch = opened(hq_folder, name).batch(0, range(6))
    assert batch.prompts == tuple(strangers.shade(batch.lq))
    assert len(set(batch.prompts)) == 6
    data = opened(hq_folder, name, workers=2)
    data.prefetch(0, [[5]])
    assert data.batch(0, [5]).prompts == batch.prompts[5:]
    for part in data.validation():
        assert part.prompts == tuple(strangers.shade(part.lq))


def test_an_image_is_shown_once_and_alone_and_without_gradients(hq_folder, monkeypatch) -> None:
    shown = []

    def watching(lq: torch.Tensor) -> list[str]:
        shown.append((len(lq), torch.is_grad_enabled()))
        return [" two\n lines "]

    monkeypatch.setattr(strangers, "shade", watching)
    data = opened(hq_folder)
    for _ in range(2):
        assert [batch.prompts for batch in data.validation()] == [("two lines",)] * 3
    assert shown == [(1, False)] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("speechles", "unknown captioner 'speechles'"),
        ("strangers:nobody", "has no 'nobody'"),
        ("strangers:NUMBER", "expected a function of images, got int"),
        ("strangers:Unmakeable", "captioner 'strangers:Unmakeable' cannot be made: TypeError"),
        ("strangers:speechless", "captioner 'strangers:speechless' gave [] for one image"),
        ("strangers:one_text", "captioner 'strangers:one_text' gave 'a' for one image"),
        ("strangers:unread", "fails: RuntimeError: no weights for the captioner"),
    ],
)
def test_captioners_that_do_not_work_are_refused_before_training(
    refused, tiny_base, hq_folder, tmp_path, name, message
) -> None:
    more = ("--set", "data.prompts=captioner", "--set", f"data.captioner={name}")
    assert message in refused.finetune(tiny_base, hq_folder, tmp_path / "run", *more)


class WordOptions(Options):
    """Of the captioner below."""

    word: str
    identity: str | None = None


class Word:
    """A captioner with an option, which says that word of each image."""

    Options = WordOptions

    def __init__(self, options: WordOptions) -> None:
        self._word, self.identity = options.word, options.identity

    def __call__(self, lq: torch.Tensor) -> list[str]:
        return [self._word]


def test_a_captioner_with_options_and_an_identity_is_kept_on_the_disk(hq_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REWARDSR_CACHE", str(tmp_path / "cache"))
    said = []
    for word, identity in (("one", None), ("two", "first"), ("three", "first"), ("four", "second")):
        captions = Captions("test_captioners:Word", {"word": word, "identity": identity})
        data = opened(hq_folder, captions=captions)
        said.append(next(data.validation()).prompts[0])
        assert data.batch(0, [0]).prompts == (word,)  # crops, which no other step shows, are not kept
    assert said == ["one", "two", "two", "four"]
    files = list((tmp_path / "cache" / "captions").rglob("*.txt"))
    assert sorted(path.read_text() for path in files) == ["four", "two"]
    with pytest.raises(UserError, match=r"data\.captioner_options .*'word' is missing"):
        Captions("test_captioners:Word")


def test_a_captioner_and_its_use_go_together(commands, refused, tiny_base, hq_folder, tmp_path) -> None:
    prompts, captioner = ("--set", "data.prompts=captioner"), ("--set", "data.captioner=strangers:shade")
    assert "set data.captioner" in refused.finetune(tiny_base, hq_folder, tmp_path / "run", *prompts)
    assert "set it to captioner" in refused.finetune(tiny_base, hq_folder, tmp_path / "run", *captioner)
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", *prompts, *captioner)
    assert answer.code == 0, answer.err
