"""StableSR: multi-step super-resolution whose UNet is modulated, block by block, by features of the LQ latents.

Source: StableSR (arXiv 2305.07015). A time-aware encoder turns the LQ latents into features at every step; they scale
and shift the residual of each residual block (`_sft.py`). Released checkpoints are read by `_stablesr_checkpoint.py`.
"""

from typing import Any, Self

from pydantic import Field
from torch import Tensor

from rewardsr.adapters._stablesr_checkpoint import (
    PREDICTION,
    import_checkpoint,
    note_prediction,
    read_checkpoint,
    read_folder,
)
from rewardsr.adapters.stable_diffusion import Ancestral, Parts, Steps, Tile, check_scheduler, load_parts
from rewardsr.batch import Condition
from rewardsr.errors import UserError
from rewardsr.hub.fetch import fetch
from rewardsr.storage import expand

__all__ = ["StableSR", "import_checkpoint", "respaced"]


class StableSR(Ancestral):
    """StableSR: a UNet modulated by features of the LQ latents, many steps."""

    name = "stablesr"
    licence = "S-Lab License 1.0 (non-commercial)"  # of the released weights

    class Options(Ancestral.Options):
        """Options of StableSR, which was trained with the empty prompt."""

        weights: str | None = Field(
            None,
            description="folder or Hub id that `rewardsr import stablesr` has written, or a released checkpoint itself "
            "(`.ckpt`, `.safetensors`; slower); null: `unet/` and `struct_encoder/` of the base",
        )
        steps: Steps = 200
        tile: Tile = 64

    options: Options

    @classmethod
    def load(cls, base: str, options: Options) -> Self:
        """Load the pipeline. The UNet's configuration says what it predicts; else the base's scheduler does."""
        source = base if options.weights is None else options.weights
        unet, encoder = _networks(source, options.revision if options.weights is None else None)
        parts = load_parts(base, options.revision, unet)
        if PREDICTION in unet.config:
            parts.scheduler = {**parts.scheduler, PREDICTION: unet.config[PREDICTION]}
            check_scheduler(parts.scheduler, f"{source}/unet")
        return cls(parts, base if options.weights is None else f"{base} + {source}", options, encoder)

    def __init__(self, parts: Parts, base: str, options: Options, encoder: Any) -> None:
        super().__init__(parts, base, options, options.scale, {"struct_encoder": encoder})
        self.struct_encoder = encoder
        _check_fit(base, self.unet, encoder)
        self._multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)  # features are not resized
        self.size_multiple *= self._multiple
        if options.tile is not None and options.tile % self._multiple:
            raise UserError(f"tile is {options.tile}, expected a multiple of {self._multiple} latents")
        self.steps = respaced(options.steps, int(self.schedule.last) + 1)

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        from rewardsr.adapters._sft import modulated

        height, width = z_t.shape[-2:]
        if height % self._multiple or width % self._multiple:
            raise ValueError(f"predict: latents are {height} x {width}, expected multiples of {self._multiple}")
        features = self.struct_encoder(condition.latents.to(self.dtype), t)
        return modulated(self.unet, features, z_t.to(self.dtype), t, condition.text.to(self.dtype)).sample


def respaced(count: int, times: int) -> tuple[int, ...]:
    """`count` evenly spaced times of the schedule, last to first, both ends among them (one alone is the first).

    The stride is added up in floating point and its halves are rounded to even, as in the original: linspace differs
    from that by one at a step of most odd counts.

    Raises:
        UserError: more steps than the schedule has.
    """
    if count > times:
        raise UserError(f"steps is {count}, expected 1 to {times}")
    stride, place, taken = (times - 1) / max(1, count - 1), 0.0, []
    for _ in range(count):
        taken.append(round(place))
        place += stride
    return tuple(reversed(taken))


def _networks(source: str, revision: str | None) -> tuple[Any, Any]:
    """UNet and encoder of a folder, a Hub id or a checkpoint."""
    path = expand(source)
    if path.is_file():
        unet, encoder = read_checkpoint(path)
        note_prediction(path, unet, encoder)
        return unet, encoder
    folder, _ = fetch(source, "weights", ("unet", "struct_encoder"), revision, outlines=True)
    return read_folder(folder)


def _check_fit(base: str, unet: Any, encoder: Any) -> None:
    """Refuse networks of different sizes: features are looked up by their width, and taken as they are."""
    levels = [len(network.config.block_out_channels) for network in (unet, encoder)]
    if levels[0] != levels[1]:
        raise UserError(f"'{base}': the UNet has {levels[0]} levels and the encoder {levels[1]}")
    given, taken = encoder.config.out_channels, unet.mid_block.resnets[0].spade.mlp_shared[0].in_channels
    if given != taken:
        raise UserError(f"'{base}': the encoder gives {given} features, but the UNet takes {taken}")
