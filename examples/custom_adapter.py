"""An adapter of your own: a one-step pipeline that starts from LQ latents mixed with noise, on Stable Diffusion parts.

rewardsr finetune --adapter custom_adapter:Mixed --base FOLDER ...      (run in the folder of this file)
"""

import torch
from pydantic import Field
from torch import Tensor

from rewardsr.adapters.stable_diffusion import Scale, StableDiffusion, load_parts
from rewardsr.batch import Condition
from rewardsr.draws import Source, draw
from rewardsr.options import FOR_LORA


class Mixed(StableDiffusion):
    """Spherical mix of LQ latents and noise, then one step at t=200."""

    name = "mixed"
    steps, noise_t = (200,), 200

    class Options(StableDiffusion.Options):
        scale: Scale = 4
        share: float = Field(0.3, ge=0, le=1, description="how much noise is mixed in", json_schema_extra=FOR_LORA)

    options: Options

    @classmethod
    def load(cls, base: str, options: Options) -> "Mixed":
        return cls(load_parts(base, options.revision), base, options, options.scale)

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        assert generator is not None
        noise = draw(condition.latents.shape, generator, device=condition.latents.device)
        angle = torch.tensor(self.options.share * torch.pi / 2)
        return torch.cos(angle) * condition.latents + torch.sin(angle) * noise
