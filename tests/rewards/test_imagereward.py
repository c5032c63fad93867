"""ImageReward against timm's ViT, transformers' BERT and recorded preprocessing; gradients; texts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _imagereward import (
    INNER,
    PATCH,
    SIDE,
    TEXTS,
    VISION_WIDTH,
    WORDS,
    batch,
    imagereward,
    images,
    released_state,
    save,
)
from _support import picked
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards.imagereward import RAW_MEAN, RAW_STD, ImageReward, preprocess
from rewardsr.rewards.probe import probe_gradient

EXACT, ROUNDING = 1e-12, 1e-5  # agreement in double and in single precision


def of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


# ---- numbers ----


def timm_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """In double precision, as in `bert_features`: what differs then is no rounding."""
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(
        img_size=SIDE,
        patch_size=PATCH,
        embed_dim=VISION_WIDTH,
        depth=3,
        num_heads=2,
        mlp_ratio=INNER / VISION_WIDTH,
        num_classes=0,
    ).eval()
    network.load_state_dict(of(state, "blip.visual_encoder."), strict=True)
    with torch.no_grad():
        return network.double().forward_features(pixels.double())


def bert_features(state: dict[str, Tensor], ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    """BERT as a decoder has cross attention; told afterwards that it is none, it makes no causal masks."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=VISION_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=INNER,
        max_position_embeddings=40,
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    network = BertModel(config, add_pooling_layer=False).eval()
    network.config.is_decoder = False
    own = of(state, "blip.text_encoder.")
    own.pop("embeddings.position_ids")
    own["embeddings.token_type_embeddings.weight"] = torch.zeros(2, VISION_WIDTH)  # BLIP has none
    network.load_state_dict(own, strict=True)
    with torch.no_grad():
        return network.double()(ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state


def tokens() -> tuple[Tensor, Tensor]:
    """Of TEXTS, written out: [CLS] a cat on a mat [SEP], and so on."""
    sentences = [[2, 5, 6, 9, 5, 10, 3], [2, 11, 7, 8, 3], [2, 3]]
    ids = torch.tensor([sentence + [0] * (35 - len(sentence)) for sentence in sentences])
    return ids, (ids > 0).long()


def test_scores_agree_with_timm_and_bert(tmp_path: Path, vocabulary: Path) -> None:
    state = released_state(text_width=VISION_WIDTH, seed=1)  # BertModel attends only to features of its own width
    reward = imagereward(save(state, tmp_path / "weights.pt"), vocabulary, text_width=VISION_WIDTH)
    pixels, (ids, mask) = preprocess(images(), SIDE), tokens()
    image = timm_features(state, pixels)
    text = bert_features(state, ids, mask, image)
    hidden = text[:, 0]
    for layer in (0, 2, 4, 6, 7):
        hidden = hidden @ state[f"mlp.layers.{layer}.weight"].double().T + state[f"mlp.layers.{layer}.bias"]
    expected = (hidden[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert image.std() > 0.5
    assert expected.std() > 0.05
    torch.testing.assert_close(reward(images(), batch()).double(), expected, atol=ROUNDING, rtol=0)

    network = reward._network.double()
    vision = network.vision(pixels.double()).last_hidden_state
    torch.testing.assert_close(vision, image, atol=EXACT, rtol=0)
    words = network.text(ids, mask, encoder_hidden_states=image, is_decoder=False).last_hidden_state
    torch.testing.assert_close(words, text, atol=EXACT, rtol=0)
    torch.testing.assert_close((network(pixels.double(), ids, mask) - RAW_MEAN) / RAW_STD, expected, atol=EXACT, rtol=0)


@pytest.mark.parametrize("antialias", [True, False])
def test_preprocessing_agrees_with_the_original(antialias: bool, golden: Callable[[str], dict[str, Tensor]]) -> None:
    recorded = golden("imagereward_preprocess")
    ours = preprocess(recorded["rm.img"] / 255, antialias=antialias)
    assert ours.shape == (1, 3, 224, 224)
    ours = ours[..., ::7, ::7]
    values, theirs = picked(ours, recorded, f"rm.pre_antialias_{antialias}_stride7")
    torch.testing.assert_close(values, theirs, atol=1e-5, rtol=0)
    values, others = picked(ours, recorded, f"rm.pre_antialias_{not antialias}_stride7")
    assert (values - others).abs().max() > 1e-2


@pytest.mark.parametrize("size", [(20, 90), (300, 224), (16, 16)])
def test_preprocessing_of_any_size(size: tuple[int, int]) -> None:
    image = images(1, *size)
    upright, lying = preprocess(image), preprocess(image.mT)
    assert upright.shape == (1, 3, 224, 224)
    torch.testing.assert_close(upright, lying.mT, atol=1e-4, rtol=0)


def test_antialias_is_an_option(weights: Path, vocabulary: Path, reward: ImageReward) -> None:
    without = imagereward(weights, vocabulary, antialias=False)
    assert (without(images(), batch()) - reward(images(), batch())).abs().min() > 1e-4


def test_a_score_belongs_to_its_image_and_text(reward: ImageReward) -> None:
    sr = images()
    scores = reward(sr, batch())
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    for row, text in enumerate(TEXTS):
        alone = reward(sr[row : row + 1], Batch(lq=torch.zeros(1, 3, 4, 4), prompts=(text,)))
        torch.testing.assert_close(alone, scores[row : row + 1], atol=1e-5, rtol=0)
    other = reward(sr, batch(("a cat on a mat", "red cats", "")))
    assert torch.allclose(other[[0, 2]], scores[[0, 2]], atol=1e-5)
    assert (other[1] - scores[1]).abs() > 1e-3
    assert (reward(sr.flip(0), batch(TEXTS[::-1])).flip(0) - scores).abs().max() < 1e-5


def test_gradients_reach_the_images(reward: ImageReward) -> None:
    sr = images().requires_grad_()
    before = reward(sr, batch())
    (of_second,) = torch.autograd.grad(before[1], sr, retain_graph=True)
    assert of_second[1].abs().sum() > 0
    assert not of_second[[0, 2]].any()
    (gradient,) = torch.autograd.grad(before.sum(), sr)
    assert (reward(sr.detach() + 1e-3 * gradient.sign(), batch()) > before).all()
    assert not any(weight.requires_grad for weight in reward._network.parameters())
    probe_gradient("imagereward", reward, batch())


def test_autocast_changes_nothing(reward: ImageReward) -> None:
    expected = reward(images(), batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(images(), batch()), expected)


# ---- texts ----


def test_texts_are_cut_and_kept(weights: Path, vocabulary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = imagereward(weights, vocabulary)
    ids, mask = reward._tokens("a " * 50)
    assert ids.tolist() == [2, *[5] * 33, 3]
    assert mask.tolist() == [1] * 35
    monkeypatch.setattr(reward, "_tokenizer", None)  # from here on it must do without
    reward(images(1), Batch(lq=torch.zeros(1, 3, 4, 4), prompts=("a " * 50,)))
    with pytest.raises(TypeError):
        reward(images(), batch())


@pytest.mark.parametrize("prompts", [None, ("a cat", None, "")])
def test_missing_texts(prompts: tuple[str | None, ...] | None, reward: ImageReward) -> None:
    with pytest.raises(UserError, match=r"'imagereward' needs prompts, .* set data.prompts to sidecar, or to one text"):
        reward(images(), batch(prompts))


def test_another_number_of_texts(reward: ImageReward) -> None:
    with pytest.raises(ValueError, match="one text an image, got 2 for 3"):
        reward(images(), batch(("a", "b")))
