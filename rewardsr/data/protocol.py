"""The protocol of a run, applied: every command opens its images here."""

from collections.abc import Sequence
from pathlib import Path

from rewardsr.data.captions import Captions
from rewardsr.data.degrade.contract import make_degradation
from rewardsr.data.folder import Data, open_data
from rewardsr.train.recipe import DataRecipe, ProtocolRecipe, SourceRecipe


def open_images(
    protocol: ProtocolRecipe,
    sources: Path | str | Sequence[SourceRecipe],
    scale: int,
    extras: Sequence[str] = (),
    *,
    max_unreadable: float = 0.01,
    workers: int = 0,
) -> Data:
    """Images to look at as a whole, with degradation and prompts as the protocol has them; pairs are taken as they are.

    Args:
        protocol: of a run (`recipe.data`), or one of its own.
        sources: where they are.
        scale: HQ is this many times LQ.
        extras: names of the tensors beside the images that the adapter takes.
        max_unreadable, workers: see `rewardsr.data.folder.open_data`.

    Raises:
        UserError: anything that is wrong with the images or the protocol.
    """
    return open_data(
        sources,
        scale=scale,
        degradation=make_degradation(protocol.degradation, scale),
        prompts=protocol.prompts,
        caption_column=protocol.caption_column,
        suffix=protocol.prompt_suffix,
        captions=make_captions(protocol),
        extras=extras,
        max_unreadable=max_unreadable,
        workers=workers,
    )


def open_training(data: DataRecipe, scale: int, extras: Sequence[str], workers: int) -> Data:
    """The training images of a recipe; arguments and errors are those of `open_images` and `open_data`."""
    return open_data(
        data.train,
        scale=scale,
        crop=data.crop,
        degradation=make_degradation(data.degradation, scale),
        prompts=data.prompts,
        caption_column=data.caption_column,
        suffix=data.prompt_suffix,
        captions=make_captions(data),
        caption_hq=data.caption_from == "hq",
        prompt_dropout=data.prompt_dropout,
        extras=extras,
        pad=data.too_small == "pad",
        max_unreadable=data.max_unreadable,
        flips=data.flip,
        workers=workers,
    )


def make_captions(protocol: ProtocolRecipe) -> Captions | None:
    """The captioner of a protocol, if it has one.

    Raises:
        UserError: as `Captions`.
    """
    if protocol.captioner is None:
        return None
    return Captions(protocol.captioner, protocol.captioner_options, protocol.prompt_suffix)
