"""A small ImageReward of random weights in the released layout, and what to score with it."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.rewards import build

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "##s", "on", "mat", "red")
VISION_WIDTH, INNER, PATCH, SIDE = 128, 96, 8, 32  # two heads, 4x4 patches
TEXTS = ("a cat on a mat", "Red dogs", "")


def released_state(text_width: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """A small ImageReward in the released layout; embeddings are so small that the LayerNorms' epsilons count."""
    random = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}

    def linear(name: str, before: int, after: int) -> None:
        state[f"{name}.weight"] = torch.randn(after, before, generator=random) / before**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(after, generator=random)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=random)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=random)

    def table(name: str, *shape: int) -> None:
        state[name] = 0.01 * torch.randn(*shape, generator=random)

    vision, text = "blip.visual_encoder", "blip.text_encoder"
    table(f"{vision}.cls_token", 1, 1, VISION_WIDTH)
    table(f"{vision}.pos_embed", 1, (SIDE // PATCH) ** 2 + 1, VISION_WIDTH)
    table(f"{vision}.patch_embed.proj.weight", VISION_WIDTH, 3, PATCH, PATCH)
    table(f"{vision}.patch_embed.proj.bias", VISION_WIDTH)
    for block in (f"{vision}.blocks.{index}" for index in range(3)):
        norm(f"{block}.norm1", VISION_WIDTH)
        linear(f"{block}.attn.qkv", VISION_WIDTH, 3 * VISION_WIDTH)
        linear(f"{block}.attn.proj", VISION_WIDTH, VISION_WIDTH)
        norm(f"{block}.norm2", VISION_WIDTH)
        linear(f"{block}.mlp.fc1", VISION_WIDTH, INNER)
        linear(f"{block}.mlp.fc2", INNER, VISION_WIDTH)
    norm(f"{vision}.norm", VISION_WIDTH)
    table(f"{text}.embeddings.word_embeddings.weight", len(WORDS) + 2, text_width)
    table(f"{text}.embeddings.position_embeddings.weight", 40, text_width)
    norm(f"{text}.embeddings.LayerNorm", text_width)
    for layer in (f"{text}.encoder.layer.{index}" for index in range(2)):
        for attention, width in (("attention", text_width), ("crossattention", VISION_WIDTH)):
            linear(f"{layer}.{attention}.self.query", text_width, text_width)
            linear(f"{layer}.{attention}.self.key", width, text_width)
            linear(f"{layer}.{attention}.self.value", width, text_width)
            linear(f"{layer}.{attention}.output.dense", text_width, text_width)
            norm(f"{layer}.{attention}.output.LayerNorm", text_width)
        linear(f"{layer}.intermediate.dense", text_width, INNER)
        linear(f"{layer}.output.dense", INNER, text_width)
        norm(f"{layer}.output.LayerNorm", text_width)
    for name, before, after in ((0, text_width, 48), (2, 48, 32), (4, 32, 16), (6, 16, 8), (7, 8, 1)):
        linear(f"mlp.layers.{name}", before, after)
    # The released file holds these as well; the score does not use them.
    linear("blip.vision_proj", VISION_WIDTH, 8)
    linear("blip.text_proj", text_width, 8)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    return state


def save(state: Any, path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def small(text_width: int = 64) -> Any:
    """Makes the module's networks as small as `released_state`, while the context lasts."""
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 3,
        "num_attention_heads": VISION_WIDTH // 64,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    text = {
        "vocab_size": len(WORDS) + 2,
        "hidden_size": text_width,
        "encoder_hidden_size": VISION_WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": text_width // 64,
        "max_position_embeddings": 40,
    }
    head = (text_width, 48, 32, 16, 8, 1)
    return patch.multiple("rewardsr.rewards.imagereward", VISION_SIZES=vision, TEXT_SIZES=text, HEAD_WIDTHS=head)


def imagereward(
    weights: Path | str | None = None, tokenizer: Path | str | None = None, text_width: int = 64, **options: Any
) -> Any:
    """A reward of small networks."""
    with small(text_width):
        return build("imagereward", weights=weights, tokenizer=tokenizer, **options)


def images(count: int = 3, height: int = 48, width: int = 40) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def batch(prompts: tuple[str | None, ...] | None = TEXTS) -> Batch:
    return Batch(lq=torch.zeros(3, 3, 4, 4), prompts=prompts)
