"""Where ImageReward's weights and tokenizer come from, and files that are none."""

import shutil
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from _imagereward import WORDS, batch, imagereward, images, save
from torch import Tensor

from rewardsr.errors import UserError
from rewardsr.hub import connection
from rewardsr.rewards.imagereward import ImageReward

# ---- files ----


def test_both_formats_and_no_draws(
    state: dict[str, Tensor], reward: ImageReward, vocabulary: Path, tmp_path: Path
) -> None:
    draws = torch.get_rng_state()
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    other = imagereward(str(save(state, tmp_path / "weights.safetensors")), str(vocabulary))
    assert torch.equal(other(images(), batch()), reward(images(), batch()))
    rounded = imagereward(save(half, tmp_path / "half.pt"), vocabulary)(images(), batch())
    torch.testing.assert_close(rounded, reward(images(), batch()), atol=0.05, rtol=0)
    assert torch.equal(torch.get_rng_state(), draws)


def test_tokenizers_as_folders(weights: Path, vocabulary: Path, reward: ImageReward, tmp_path: Path) -> None:
    reward._tokenizer.save_pretrained(tmp_path)  # writes no vocab.txt
    for folder in (vocabulary.parent, tmp_path):
        assert torch.equal(imagereward(weights, folder)._tokens("Red cats"), reward._tokens("Red cats"))


def test_unused_tensors_may_be_missing_or_more(state: dict[str, Tensor], vocabulary: Path, tmp_path: Path) -> None:
    used = {name: value for name, value in state.items() if "_proj." not in name and "position_ids" not in name}
    assert len(used) == len(state) - 5
    more = ("blip.visual_encoder_m.cls_token", "blip.image_queue", "blip.queue_ptr", "blip.text_proj_m.weight")
    for content in (used, {**state, **{name: torch.full((1,), float("nan")) for name in more}}):
        imagereward(save(content, tmp_path / "weights.pt"), vocabulary)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp.layers.7.bias": None}, r"1 missing \(mlp.layers.7.bias, ...\)"),
        ({"blip.visual_encoder.blocks.1.attn.qkv.bias": None}, r"1 missing \(blip.visual_encoder.blocks.1.attn.qkv.b"),
        ({"blip.text_encoder.pooler.dense.bias": torch.zeros(64)}, r"1 unknown \(blip.text_encoder.pooler.dense.bias"),
        ({"mlp.layers.7.bias": torch.zeros(2)}, r"1 of another shape or type \(mlp.layers.7.bias"),
        ({"mlp.layers.7.bias": torch.tensor([float("inf")])}, "not finite, in mlp.layers.7.bias"),
        ({"mlp.layers.7.bias": torch.zeros(1, dtype=torch.long)}, r"1 of another shape or type \(mlp.layers.7.bias"),
        ({"mlp.layers.7.bias": "text"}, "holds no state dict"),
        (
            {"blip.visual_encoder.pos_embed": torch.zeros(17, 128)},
            r"of another shape or type \(blip.visual_encoder.pos",
        ),
    ],
)
def test_weights_that_do_not_fit(
    changes: dict[str, Any], message: str, state: dict[str, Tensor], vocabulary: Path, tmp_path: Path
) -> None:
    content = {name: value for name, value in {**state, **changes}.items() if value is not None}
    path = save(content, tmp_path / "weights.pt")
    with pytest.raises(
        UserError, match=f"reward 'imagereward': the weights in '{path}' do not fit: .*{message}"
    ) as caught:
        imagereward(path, vocabulary)
    assert "\n" not in str(caught.value)


class Harmful:
    """A pickle that runs code when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_files_that_cannot_be_read(weights: Path, vocabulary: Path, tmp_path: Path) -> None:
    trace, whole = tmp_path / "ran", weights.read_bytes()
    save({"mlp.layers.0.weight": Harmful(trace)}, tmp_path / "harmful.pt")
    for name, content in (
        ("cut.pt", whole[: len(whole) // 2]),
        ("noise.pt", bytes(range(256)) * 8),
        ("empty.pt", b""),
        ("noise.safetensors", bytes(range(256))),
    ):
        (tmp_path / name).write_bytes(content)
    for name in ("harmful.pt", "cut.pt", "noise.pt", "empty.pt", "noise.safetensors"):
        with pytest.raises(UserError, match=f"reward 'imagereward': '.*{name}' (is|holds)") as caught:
            imagereward(tmp_path / name, vocabulary)
        assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_files_are_looked_for_before_anything_is_read(weights: Path, vocabulary: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(UserError, match=f"reward 'imagereward': no weights file '{path}'"):
            imagereward(path, vocabulary)
    with pytest.raises(UserError, match=f"reward 'imagereward': no tokenizer '{tmp_path / 'words'}'"):
        imagereward(tmp_path / "damaged.pt", tmp_path / "words")


def test_tokenizers_that_do_not_fit(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"tokenizer '{tmp_path}' has neither tokenizer.json nor vocab.txt"):
        imagereward(weights, tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS[:-1]))
    with pytest.raises(UserError, match="has 11 words, expected 12: give bert-base-uncased"):
        imagereward(weights, tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    for path in (tmp_path, tmp_path / "binary.txt"):
        with pytest.raises(UserError, match=f"tokenizer '{path}' cannot be read") as caught:
            imagereward(weights, path)
        assert "\n" not in str(caught.value)


# ---- the Hub ----


def test_offline_is_refused_at_once(weights: Path, vocabulary: Path, offline: Path) -> None:
    for arguments, file, option in (
        ({}, "ImageReward.pt of THUDM/ImageReward", "weights"),
        ({"tokenizer": vocabulary}, "ImageReward.pt of THUDM/ImageReward", "weights"),
        ({"weights": weights}, "vocab.txt of google-bert/bert-base-uncased", "tokenizer"),
    ):
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            imagereward(**arguments)
        assert time.monotonic() - start < 5
        message = str(caught.value)
        assert message.startswith(f"reward 'imagereward': {file} cannot be found in a cache")
        assert message.endswith(f"options: {{{option}: PATH}}")
        assert "\n" not in message


def test_cached_files_work_offline(weights: Path, vocabulary: Path, reward: ImageReward, offline: Path) -> None:
    for repository, file in (("THUDM--ImageReward", weights), ("google-bert--bert-base-uncased", vocabulary)):
        folder = offline / f"models--{repository}"
        (folder / "snapshots" / "0123").mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0123")
        shutil.copy(file, folder / "snapshots" / "0123" / file.name)
    assert torch.equal(imagereward()(images(), batch()), reward(images(), batch()))


@pytest.mark.parametrize("answers", [True, False])
def test_what_is_not_cached_is_fetched(
    answers: bool, weights: Path, vocabulary: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[str, str]] = []
    download = huggingface_hub.hf_hub_download

    def fetch(repository: str, file: str, local_files_only: bool = False) -> str:
        if local_files_only:
            return download(repository, file, local_files_only=True)
        if not answers:
            raise OSError("the server\nis down")
        fetched.append((repository, file))
        return str(weights if file == "ImageReward.pt" else vocabulary)

    monkeypatch.setattr(connection, "online", lambda timeout=3.0: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    if answers:
        assert imagereward()(images(), batch()).isfinite().all()
        assert fetched == [("THUDM/ImageReward", "ImageReward.pt"), ("google-bert/bert-base-uncased", "vocab.txt")]
    else:
        with pytest.raises(UserError, match=r"could not be fetched: OSError: the server is down; .*\{weights: PATH\}"):
            imagereward()
