"""An adapter written from the contract alone: diffusion on pixels, without text and without an autoencoder.

SR3 (arXiv 2104.07636) on a folder of diffusers: `unet/` (a UNet2DModel that takes the noisy image and the upsampled LQ
image, 6 channels, and gives 3) and `scheduler/`. What other pipelines call latents are images in [-1, 1] here.

rewardsr finetune --adapter adapter_from_scratch:SR3 --base FOLDER ...      (run in the folder of this file)
"""

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from pydantic import Field
from torch import Tensor

from rewardsr import options
from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.batch import Batch, Condition
from rewardsr.draws import Source, draw
from rewardsr.hub.fetch import fetch
from rewardsr.lora.fingerprint import fingerprint
from rewardsr.schedule import VP, fewer


class SR3(ISRAdapter):
    """Diffusion on pixels, conditioned on the upsampled LQ image."""

    name = "sr3"
    compression = 1  # pixels a latent is wide

    class Options(options.Options):
        scale: int = Field(4, ge=1, description="`sr` is this many times `lq`")
        steps: int = Field(20, ge=1, description="of the sampler (DDIM)")

    @classmethod
    def load(cls, base: str, options: Options) -> "SR3":
        folder, revision = fetch(base, "base", ("unet", "scheduler"))
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler")
        return cls(UNet2DModel.from_pretrained(folder / "unet"), scheduler.alphas_cumprod, options, base, revision)

    def __init__(self, unet: Any, alphas_cumprod: Tensor, options: Options, base: str, revision: str) -> None:
        self.unet = unet.requires_grad_(False).eval()
        self.networks = self.trainable = {"unet": self.unet}
        self.lora_targets = {"unet": ("conv1", "conv2")}
        self.base_model = BaseModel(base, revision, fingerprint(self.networks))
        self.device, self.dtype = unet.device, unet.dtype
        self.schedule = VP(alphas_cumprod, "epsilon")
        self.steps = fewer(tuple(range(len(alphas_cumprod) - 1, -1, -1)), options.steps)
        self.scale, self.size_multiple = options.scale, 2 ** (len(unet.config.block_out_channels) - 1)

    def _encode(self, batch: Batch, generator: Source | None) -> Condition:
        image = self.upsample(batch.lq)
        no_text = image.new_zeros(len(batch), 1, 1)
        return Condition(no_text, self.to_latents(image), (image.shape[-2], image.shape[-1]))

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        assert generator is not None
        return draw(condition.latents.shape, generator, device=condition.latents.device)

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return self.unet(torch.cat([z_t, condition.latents], 1).to(self.dtype), t).sample

    def _to_latents(self, image: Tensor, generator: Source | None) -> Tensor:
        return image * 2 - 1

    def _to_image(self, z0: Tensor) -> Tensor:
        return z0 / 2 + 0.5

    @property
    def deterministic(self) -> bool:
        return False  # it starts from noise
