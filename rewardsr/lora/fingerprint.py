"""Telling base models apart, by all of their weights.

A fingerprint is the same up to rounding for fp16, bf16 and fp32 copies, mirrors and file formats of the same weights,
and differs where any tensor does by more than rounding. So fingerprints are compared with `same_base`, not as text.

Each million of weights is described by its size (root mean square) and by how far it reaches along a few fixed
directions of random signs, in units of what random weights of that size reach: rounding, which is as good as random,
moves that by a few thousandths, and another tensor of the same size by about one.

Of a network that was loaded in outline (`rewardsr.outline`) most weights are not known; such fingerprints are compared
in what both know.
"""

import base64
import binascii
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

BLOCK, WIDTH, DIRECTIONS = 2**20, 2**10, 4
NUMBERS = np.dtype([("size", "<f4"), ("along", "<f2", DIRECTIONS)])
# Rounding to bf16 changes a number by up to 2^-8 of it, and by a third of that as a rule. Twice that is six times the
# spread of what comes of it along a direction.
SIZE_TOLERANCE, ALONG_TOLERANCE = 2**-8, 3 * 2**-8
SMALLEST = 2**-24  # of fp16, which has no relative precision left there
UNKNOWN = -1.0  # size of a block whose weights were not read
PROMPTS = (
    "a photo of two cats, sitting on 37 old books",
    "Dotted; noise! blur? lowres: <smooth> (best quality) it's",
    "",
)


def fingerprint(parts: Mapping[str, Any]) -> str:
    """What identifies a base: `component=structure:numbers;...`, of a tokenizer `component=hash:`.

    Args:
        parts: by component name ("unet"), before any LoRA is attached: the networks of the base, those that carry no
            LoRA as well, and the tokenizer.
    """
    return ";".join(
        f"{name}={_of_network(p) if isinstance(p, nn.Module) else _of_tokenizer(p)}" for name, p in parts.items()
    )


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints belong to the same weights."""
    return not differing(one, other)


def differing(one: str, other: str) -> list[str]:
    """Components in which two fingerprints are not of the same weights; empty for the same base."""
    ours, theirs = (dict(_split(text)) for text in (one, other))
    return [name for name in {**ours, **theirs} if not _same(ours.get(name, ""), theirs.get(name, ""))]


def _split(text: str) -> Iterator[tuple[str, str]]:
    for part in text.split(";"):
        name, _, described = part.partition("=")
        yield name, described


def _same(one: str, other: str) -> bool:
    (structure, _, numbers), (other_structure, _, other_numbers) = one.partition(":"), other.partition(":")
    if structure != other_structure or not structure:
        return False
    try:
        ours, theirs = (
            np.frombuffer(base64.b64decode(text, b"-_", validate=True), NUMBERS) for text in (numbers, other_numbers)
        )
    except (ValueError, binascii.Error):  # of a damaged header
        return False
    if len(ours) != len(theirs):
        return False
    known = (ours["size"] != UNKNOWN) & (theirs["size"] != UNKNOWN)
    if len(ours) and not known.any():
        return False
    ours, theirs = ours[known], theirs[known]
    size = np.maximum(ours["size"], SMALLEST)
    along, other_along = (found["along"].astype(np.float32) for found in (ours, theirs))
    sizes_agree = np.abs(ours["size"] - theirs["size"]) <= SIZE_TOLERANCE * size + SMALLEST
    slack = ALONG_TOLERANCE + (6 * SMALLEST / size)[:, None] + SIZE_TOLERANCE * np.abs(along)
    return bool(sizes_agree.all() and (np.abs(along - other_along) <= slack).all())


@torch.no_grad()
def _of_network(network: nn.Module) -> str:
    # The text encoder of one version of transformers has a prefix that it has not in another.
    tensors: dict[str, Tensor] = {
        name.replace("text_model.", ""): tensor
        for name, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    shapes = ";".join(f"{name}:{tuple(tensors[name].shape)}" for name in sorted(tensors))
    described = torch.stack([row.cpu() for name in sorted(tensors) for row in _described(tensors[name])]).numpy()
    numbers = np.zeros(len(described), NUMBERS)
    numbers["size"], numbers["along"] = described[:, 0], described[:, 1:]
    return f"{hashlib.sha256(shapes.encode()).hexdigest()[:16]}:{base64.urlsafe_b64encode(numbers.tobytes()).decode()}"


def _described(tensor: Tensor) -> Iterator[Tensor]:
    """Size, and length along each direction, (1 + DIRECTIONS,) of every block of a tensor."""
    if tensor.is_meta:
        unknown = torch.zeros(1 + DIRECTIONS)
        unknown[0] = UNKNOWN
        yield from [unknown] * max(1, -(-tensor.numel() // BLOCK))
        return
    columns, rows = (signs.to(tensor.device) for signs in _SIGNS)
    for block in tensor.detach().flatten().split(BLOCK):
        block = block.float()
        count = block.numel()
        whole = block if count <= WIDTH else nn.functional.pad(block, (0, -count % WIDTH))
        grid = whole.view(-1, min(count, WIDTH))
        norm = block.square().sum().sqrt()
        along = ((grid @ columns[: grid.shape[1]]) * rows[: len(grid)]).sum(0) / norm.clamp(min=SMALLEST)
        yield torch.cat([(norm / count**0.5)[None], along])


def _signs(name: str, count: int) -> Tensor:
    """(count, DIRECTIONS) of -1 and 1, the same for ever."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(name.encode()).digest(count * DIRECTIONS // 8), np.uint8))
    return torch.from_numpy(bits.astype(np.float32) * 2 - 1).view(count, DIRECTIONS)


_SIGNS = _signs("columns", WIDTH), _signs("rows", BLOCK // WIDTH)


def _of_tokenizer(tokenizer: Any) -> str:
    """By its vocabulary, and by what it makes of a few prompts."""
    ids = tokenizer(list(PROMPTS), max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
    vocabulary = sorted(tokenizer.get_vocab().items()) if hasattr(tokenizer, "get_vocab") else None
    return f"{hashlib.sha256(repr((ids.tolist(), vocabulary)).encode()).hexdigest()[:16]}:"


# ---- files of 0.1.0 ----


def is_early(text: str) -> bool:
    """Whether a fingerprint is one of 0.1.0: `structure:v,v,...`, a hash of names and shapes, and 64 weights."""
    return "=" not in text


def matches_early(networks: Mapping[str, nn.Module], text: str) -> bool:
    """Whether networks, with LoRAs on them or not, are of a fingerprint of 0.1.0."""
    tensors = {
        f"{component}.{name.replace('.base_layer.', '.')}": value
        for component, network in networks.items()
        for name, value in network.state_dict().items()
        if ".lora_" not in name
    }
    shapes = ";".join(f"{name}:{tuple(tensors[name].shape)}" for name in sorted(tensors))
    matrices = [name for name in sorted(tensors) if tensors[name].ndim >= 2]
    own: list[float] = []
    for name in matrices[:: max(1, len(matrices) // 16)][:16]:
        flat = tensors[name].detach().flatten()
        own += [float(value) for value in flat[:: max(1, len(flat) // 4)][:4]]
    structure, _, values = text.partition(":")
    try:
        theirs = [float(value) for value in values.split(",")]
    except ValueError:
        return False
    return (
        structure == hashlib.sha256(shapes.encode()).hexdigest()[:16]
        and len(own) == len(theirs)
        and all(abs(a - b) <= 2**-7 * max(abs(a), abs(b)) + 1e-5 for a, b in zip(own, theirs, strict=True))
    )
