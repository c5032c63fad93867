"""The protocol of a run, applied: every command opens its images here."""

from collections.abc import Sequence
from pathlib import Path

from rewardsr.data.captions import Captions
from rewardsr.data.degrade.contract import make_degradation
from rewardsr.data.folder import Data, open_data
from rewardsr.train.recipe import ProtocolRecipe


def open_images(
    protocol: ProtocolRecipe,
    folder: Path | str,
    scale: int,
    extras: Sequence[str] = (),
    *,
    crop: int | None = None,
    flips: bool = False,
    workers: int = 0,
) -> Data:
    """Images of a folder with degradation and prompts as the protocol has them; pairs are taken as they are.

    Args:
        protocol: of a run (`recipe.data`), or one of its own.
        folder: of HQ images, or of pairs.
        scale: HQ is this many times LQ.
        extras: names of the tensors beside the images that the adapter takes.
        crop, flips, workers: see `rewardsr.data.folder.open_data`.

    Raises:
        UserError: anything that is wrong with the folder or the protocol.
    """
    return open_data(
        folder,
        scale=scale,
        crop=crop,
        degradation=make_degradation(protocol.degradation, scale),
        prompts=protocol.prompts,
        captions=None if protocol.captioner is None else Captions(protocol.captioner),
        extras=extras,
        flips=flips,
        workers=workers,
    )
