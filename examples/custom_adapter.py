"""An adapter of your own: a one-step pipeline that starts from LQ latents mixed with noise, on Stable Diffusion parts.

rewardsr finetune --adapter custom_adapter:Mixed --base FOLDER ...      (run in the folder of this file)
"""

import torch
from torch import Tensor

from rewardsr.adapter import Batch, Condition
from rewardsr.adapters.stable_diffusion import StableDiffusion, load_parts
from rewardsr.draws import Source, draw


class Mixed(StableDiffusion):
    """Spherical mix of LQ latents and noise, then one step at t=200."""

    name = "mixed"

    @classmethod
    def load(cls, base: str, *, share: float = 0.3, scale: int = 4, prompt: str = "") -> "Mixed":
        """Load an SD-shaped folder; `share` in [0, 1] is how much noise is mixed in."""
        adapter = cls(load_parts(base), base, scale, prompt)
        adapter.share, adapter.steps, adapter.noise_t = share, (200,), 200
        return adapter

    share: float

    def _encode(self, batch: Batch, generator: Source | None) -> Condition:
        image = self.upsample(batch.lq)
        text = self._text(batch.prompts, len(batch))
        return Condition(text, self._to_latents(self.pad(image), generator), (image.shape[-2], image.shape[-1]))

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        assert generator is not None
        noise = draw(condition.latents.shape, generator, device=condition.latents.device)
        angle = torch.tensor(self.share * torch.pi / 2)
        return torch.cos(angle) * condition.latents + torch.sin(angle) * noise
