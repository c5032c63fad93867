"""Stable Diffusion's x4 upscaler: multi-step super-resolution whose UNet sees the LQ image beside the latents.

Source: diffusers' StableDiffusionUpscalePipeline and the pipelines that it loads, such as
stabilityai/stable-diffusion-x4-upscaler. The latents have the size of the LQ image, so the autoencoder's compression is
how many times `sr` is larger. The LQ image is noised itself, and the UNet is told how much as a class.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from rewardsr.adapters.stable_diffusion import (
    Guidance,
    Parts,
    StableDiffusion,
    Steps,
    TileOverlap,
    check_scheduler,
    compression,
    load_parts,
    make_scheduler,
    parts_of,
    scheduler_config,
    times,
)
from rewardsr.batch import Batch, Condition
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError
from rewardsr.hub.fetch import fetch
from rewardsr.json_object import read_object
from rewardsr.options import FOR_LORA
from rewardsr.schedule import VP, Coefficient

LOW_RES = "low_res_scheduler"  # the part whose schedule the LQ image is noised by
SCALING_FACTOR = 0.08333  # of the autoencoder; diffusers' pipeline sets it, whatever the files say


class SDUpscaler(StableDiffusion):
    """Stable Diffusion x4 upscaler: the noised LQ image goes into the UNet beside the latents, many steps.

    Any scheduler in the folder is sampled with deterministic DDIM, at the times that its configuration names; what
    else it does (clipping, thresholding, other solvers) is left out. With a DDIM scheduler as released, images equal
    those of diffusers' pipeline.
    """

    name = "sd_upscaler"
    extra_channels = 3
    noisy_condition = True

    class Options(StableDiffusion.Options):
        """Options of the upscaler; its latents are as large as the LQ image, and so are its tiles."""

        tile_overlap: TileOverlap = 16
        steps: Steps = 75
        noise_level: int = Field(
            20,
            ge=0,
            description="time of `low_res_scheduler` that the LQ image is noised as of; the UNet is told so",
            json_schema_extra=FOR_LORA,
        )
        guidance: Guidance = 9.0
        negative_prompt: str = Field("", description="of the guidance")

    options: Options

    @classmethod
    def load(cls, base: str, options: Options) -> Self:
        """Load the pipeline, in float32 on the CPU."""
        folder, _ = fetch(base, "base", (LOW_RES,), options.revision)
        if not (folder / LOW_RES).is_dir():
            raise UserError(f"base '{base}' has no folder '{LOW_RES}/': it is no Stable Diffusion upscaler")
        low_res, highest = scheduler_config(folder / LOW_RES), _highest_level(folder / "model_index.json")
        parts = load_parts(base, options.revision)
        parts.vae.register_to_config(scaling_factor=SCALING_FACTOR)
        return cls(parts, base, options, low_res, highest)

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        """Whether the pipeline has a schedule for the LQ image, and a UNet that takes that image beside the latents."""
        taken = getattr(getattr(getattr(pipe, "unet", None), "config", None), "in_channels", 0)
        latents = getattr(getattr(getattr(pipe, "vae", None), "config", None), "latent_channels", 0)
        return getattr(pipe, LOW_RES, None) is not None and taken == latents + cls.extra_channels

    @classmethod
    def from_pipeline(cls, pipe: Any, options: Options) -> Self:
        """An adapter on a live StableDiffusionUpscalePipeline."""
        kind = type(pipe).__name__
        if getattr(pipe, LOW_RES, None) is None:
            raise UserError(f"{kind} has no {LOW_RES}: it is no Stable Diffusion upscaler")
        parts, identity = parts_of(pipe)
        low_res = dict(getattr(pipe, LOW_RES).config)
        check_scheduler(low_res, f"{kind}.{LOW_RES}")
        highest = getattr(pipe, "config", {}).get("max_noise_level")
        return cls(parts, identity, options, low_res, highest)

    def __init__(
        self, parts: Parts, base: str, options: Options, low_res: Mapping[str, Any], highest_level: int | None
    ) -> None:
        super().__init__(parts, base, options, compression(parts.vae))
        self._low_res = VP(make_scheduler(low_res).alphas_cumprod)
        classes = self.unet.config.get("num_class_embeds")
        limits = (int(self._low_res.last), None if classes is None else classes - 1, highest_level)
        highest = min(limit for limit in limits if limit is not None)
        if options.noise_level > highest:
            raise UserError(f"noise_level is {options.noise_level}, expected 0 to {highest}")
        self.steps = times(parts.scheduler, options.steps)
        self.guidance = options.guidance
        self._to_one = bool(parts.scheduler.get("set_alpha_to_one", True))

    @property
    def deterministic(self) -> bool:
        """Never: even a single step starts from noise."""
        return False

    def _encode(self, batch: Batch, generator: Source | None) -> Condition:
        image = batch.lq * 2 - 1
        # The mode of the noised image has the noise level's share of signal, and no noise.
        noise = torch.zeros_like(image) if generator is None else draw(image.shape, generator, device=image.device)
        count, _, height, width = image.shape
        return Condition(
            text=self._text(batch.prompts, count),
            # Denoising starts from noise alone: only their shape matters, and encoding would be for nothing.
            latents=image.new_zeros(count, self.vae.config.latent_channels, height, width),
            size=(height * self.scale, width * self.scale),
            negative=self._text((self.options.negative_prompt,) * count, count) if self.guidance != 1 else None,
            control=self._low_res.add_noise(image, noise, self.options.noise_level),
        )

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        assert generator is not None  # `start` has seen to it
        return draw(condition.latents.shape, generator, device=condition.latents.device)

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        assert condition.control is not None
        seen = torch.cat([z_t, condition.control], 1).to(self.dtype)
        level = torch.full_like(t, self.options.noise_level)
        return self.unet(seen, t, condition.text.to(self.dtype), class_labels=level).sample

    def transition(self, z: Tensor, prediction: Tensor, t: float, t_next: float) -> tuple[Tensor, Coefficient]:
        """One step of deterministic DDIM."""
        # Without set_alpha_to_one, diffusers' DDIM ends at the little noise of time 0.
        return super().transition(z, prediction, t, t_next if self._to_one else max(t_next, 0))


def _highest_level(index: Path) -> int | None:
    """The highest noise level that the pipeline's own file allows; None where there is no file or it does not say."""
    if not index.is_file():
        return None
    try:
        level = read_object(index).get("max_noise_level")
        return None if level is None else int(level)
    except (ValueError, TypeError) as error:
        raise UserError(f"'{index}' is damaged") from error
