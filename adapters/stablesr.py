"""StableSR: multi-step super-resolution whose UNet is modulated, block by block, by features of the LQ latents.

Source: StableSR (arXiv 2305.07015). A time-aware encoder turns the LQ latents into features at every step; they scale
and shift the residual of each residual block (`_sft.py`). Released checkpoints are read by `_stablesr_checkpoint.py`.
"""

from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from rewardsr.adapter import Condition
from rewardsr.adapters._stablesr_checkpoint import (
    PREDICTION,
    import_checkpoint,
    note_prediction,
    read_checkpoint,
    read_folder,
)
from rewardsr.adapters.stable_diffusion import Ancestral, Parts, check_scheduler, load_parts
from rewardsr.errors import UserError
from rewardsr.hub.fetch import fetch
from rewardsr.tiling import Tiling

__all__ = ["StableSR", "import_checkpoint", "respaced"]


class StableSR(Ancestral):
    """StableSR: a UNet modulated by features of the LQ latents, many steps."""

    name = "stablesr"
    licence = "S-Lab License 1.0 (non-commercial)"  # of the released weights

    @classmethod
    def load(
        cls,
        base: str,
        *,
        weights: str | None = None,
        steps: int = 200,
        start_point: Literal["lq", "noise"] = "lq",
        scale: int = 4,
        prompt: str = "",
        tile: int | None = 64,
        tile_overlap: int = 32,
        tile_weights: Literal["centred", "original"] = "centred",
        revision: str | None = None,
    ) -> Self:
        """Load the pipeline, in float32 on the CPU.

        Args:
            base: diffusers folder or Hub id with vae, text encoder, tokenizer and scheduler (Stable Diffusion 2.1).
            weights: folder or Hub id that `rewardsr import stablesr` has written (`unet/` and `struct_encoder/`), or a
                released checkpoint itself (`.ckpt`, `.safetensors`; slower to load). By default the folders lie in the
                base. The UNet's configuration says what it predicts; else the base's scheduler does.
            steps: of the sampler (ancestral DDPM on respaced times).
            start_point: "lq" starts from the LQ latents noised as of t=999, "noise" from noise alone.
            scale: `sr` is this many times `lq`; 1 for inputs already at output size.
            prompt: text for images that bring none; StableSR was trained with the empty one.
            tile, tile_overlap: latents of more than tile x tile are sampled in tiles; None never cuts.
            tile_weights: "centred", or "original", which lie half a latent pixel too low.
            revision: branch, tag or commit of a Hub base.

        Raises:
            UserError: anything that cannot be had, read or fitted.
        """
        unet, encoder = _networks(base if weights is None else weights)
        parts = load_parts(base, revision, unet)
        if PREDICTION in unet.config:
            parts.scheduler = {**parts.scheduler, PREDICTION: unet.config[PREDICTION]}
            check_scheduler(parts.scheduler, f"{base if weights is None else weights}/unet")
        return cls(
            parts,
            encoder,
            base if weights is None else f"{base} + {weights}",
            steps=steps,
            start_point=start_point,
            scale=scale,
            prompt=prompt,
            tile=tile,
            tile_overlap=tile_overlap,
            tile_weights=tile_weights,
        )

    def __init__(
        self,
        parts: Parts,
        encoder: Any,
        base: str,
        *,
        steps: int = 200,
        start_point: str = "lq",
        scale: int = 4,
        prompt: str = "",
        tile: int | None = 64,
        tile_overlap: int = 32,
        tile_weights: str = "centred",
    ) -> None:
        super().__init__(parts, base, scale, prompt, {"struct_encoder": encoder})
        self.struct_encoder = encoder
        _check_fit(base, self.unet, encoder)
        self.start_point = start_point
        self._multiple = 2 ** (len(self.unet.config.block_out_channels) - 1)  # features are not resized
        self.size_multiple *= self._multiple
        if tile is not None and tile % self._multiple:
            raise UserError(f"tile is {tile}, expected a multiple of {self._multiple} latents")
        self.steps = respaced(steps, int(self.schedule.last) + 1)
        self.tiling = None if tile is None else Tiling(tile, tile_overlap, off_centre=tile_weights == "original")

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        from rewardsr.adapters._sft import modulated

        height, width = z_t.shape[-2:]
        if height % self._multiple or width % self._multiple:
            raise ValueError(f"predict: latents are {height} x {width}, expected multiples of {self._multiple}")
        features = self.struct_encoder(condition.latents.to(self.dtype), t)
        prediction: Tensor = modulated(self.unet, features, z_t.to(self.dtype), t, condition.text.to(self.dtype)).sample
        return prediction


def respaced(count: int, times: int) -> tuple[int, ...]:
    """`count` evenly spaced times of the schedule, last to first, both ends among them (one alone is the first).

    The stride is added up in floating point and its halves are rounded to even, as in the original: linspace differs
    from that by one at a step of most odd counts.

    Raises:
        UserError: fewer than one step, or more than the schedule has.
    """
    if not 1 <= count <= times:
        raise UserError(f"steps is {count}, expected 1 to {times}")
    stride, place, taken = (times - 1) / max(1, count - 1), 0.0, []
    for _ in range(count):
        taken.append(round(place))
        place += stride
    return tuple(reversed(taken))


def _networks(source: str) -> tuple[Any, Any]:
    """UNet and encoder of a folder, a Hub id or a checkpoint."""
    path = Path(source).expanduser()
    if path.is_file():
        unet, encoder = read_checkpoint(path)
        note_prediction(path, unet, encoder)
        return unet, encoder
    folder, _ = fetch(source, "weights", ("unet", "struct_encoder"))
    return read_folder(folder)


def _check_fit(base: str, unet: Any, encoder: Any) -> None:
    """Refuse networks of different sizes: features are looked up by their width, and taken as they are."""
    levels = [len(network.config.block_out_channels) for network in (unet, encoder)]
    if levels[0] != levels[1]:
        raise UserError(f"'{base}': the UNet has {levels[0]} levels and the encoder {levels[1]}")
    given, taken = encoder.config.out_channels, unet.mid_block.resnets[0].spade.mlp_shared[0].in_channels
    if given != taken:
        raise UserError(f"'{base}': the encoder gives {given} features, but the UNet takes {taken}")
