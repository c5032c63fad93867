"""The arithmetic of the released training steps, in our own words, on our networks: what ours is measured against.

As the papers' code runs it: every prompt is encoded every time it is used; outputs are sampled one after the other; the
reference is a second network with weights of its own; and everything runs under autocast. What the code does beside the
arithmetic (taggers, files, logs) is left out, and so are the rewards, which are the caller's. Where a fact is not
known, the cheaper reading is taken: networks in `adapter.dtype`, no gradients towards weights that are not trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.draws import Source, draw

NEGATIVE = "dotted, noise, blur, lowres, smooth"  # encoded beside every prompt, and never used
Part = Callable[[str], AbstractContextManager[Any]]


class Released:
    """The network calls of a released step.

    Args:
        adapter: of the Stable Diffusion family, one-step, with our LoRA on its UNet.
        second: the reference, a UNet without a LoRA and with weights of its own.
        part: told which part of the step begins (`_meter.Meter.part`).
    """

    def __init__(self, adapter: Any, second: Any, part: Part | None = None) -> None:
        self.adapter, self.second = adapter, second
        self.part = part or (lambda name: nullcontext())

    def step(self, batch: Batch, sampling: Source, update: Source) -> Tensor:
        """Loss of a batch, back-propagated; what the forward pass made is alive until then."""
        half = self.adapter.dtype != torch.float32
        with torch.autocast(batch.lq.device.type, self.adapter.dtype) if half else nullcontext():
            loss, _kept = self._forward(batch, sampling, update)
        with self.part("backward"):
            loss.backward()
        return loss.detach()

    def _forward(self, batch: Batch, sampling: Source, update: Source) -> tuple[Tensor, tuple[Tensor, ...]]:
        raise NotImplementedError

    @torch.no_grad()
    def _text(self, prompt: str | None, device: torch.device) -> Tensor:
        """(1, L, D) embeddings."""
        with self.part("text"):
            tokens = self.adapter._tokenizer(
                [prompt or ""], max_length=77, padding="max_length", truncation=True, return_tensors="pt"
            )
            return self.adapter._text_encoder(tokens.input_ids.to(device))[0]

    @torch.no_grad()
    def _encode(self, image: Tensor, noise: Tensor) -> Tensor:
        """Latents of images in [0, 1], a posterior sample."""
        posterior = self.adapter.vae.encode(image * 2 - 1).latent_dist
        return (posterior.mean.float() + posterior.std.float() * noise) * self.adapter.vae.config.scaling_factor

    def _decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1]."""
        image = self.adapter.vae.decode(latents / self.adapter.vae.config.scaling_factor).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def _noise(self, shape: tuple[int, ...], source: Source, like: Tensor) -> Tensor:
        return draw(shape, source, device=like.device)


class GDPOSR(Released):
    """The step of GDPO-SR: 6 outputs of each image under the second UNet, judged, and compared on noised outputs.

    Args:
        judge: advantages (B, G) of outputs (B*G, 3, H, W) of a batch.
        group: outputs of an image.
        beta: strength of the preference.
    """

    def __init__(
        self,
        adapter: Any,
        second: Any,
        judge: Callable[[Tensor, Batch], Tensor],
        group: int,
        beta: float,
        part: Part | None = None,
    ) -> None:
        super().__init__(adapter, second, part)
        self._judge, self._group, self._beta = judge, group, beta

    def _forward(self, batch: Batch, sampling: Source, update: Source) -> tuple[Tensor, tuple[Tensor, ...]]:
        adapter, device, rows = self.adapter, batch.lq.device, len(batch) * self._group
        sr, shape = self._sample(batch, sampling)
        with self.part("rewards"):
            advantages = self._judge(sr, batch)
        prompts = batch.repeat(self._group).prompts or (None,) * rows
        text = torch.cat([self._text(prompt, device) for prompt in prompts])
        for _ in prompts:
            self._text(NEGATIVE, device)
        with self.part("re-encode"):
            latents = self._encode(sr, self._noise(shape, sampling, sr))
        noise = self._noise(shape, update, sr)
        z_t = adapter.schedule.add_noise(latents, noise, adapter.noise_t)
        with self.part("policy forward"):
            policy = adapter.unet(z_t, adapter.net_t, text).sample.float()
        with self.part("unused decodes"):  # with the policy's graph
            kept = self._decode(adapter.schedule.x0(z_t, policy, adapter.net_t))
        with torch.no_grad():
            with self.part("reference forward"):
                reference = self.second(z_t, adapter.net_t, text).sample.float()
            with self.part("unused decodes"):
                also_kept = self._decode(adapter.schedule.x0(z_t, reference, adapter.net_t))
        ours, theirs = ((p - noise).square().mean((1, 2, 3)).view_as(advantages) for p in (policy, reference))
        inside = -self._beta / 2 * ((advantages * ours).sum(1) - (advantages * theirs).sum(1))
        return -F.logsigmoid(inside).mean(), (kept, also_kept)

    @torch.no_grad()
    def _sample(self, batch: Batch, source: Source) -> tuple[Tensor, tuple[int, ...]]:
        """Outputs (B*G, 3, H, W) one after the other, and the shape of their latents."""
        adapter = self.adapter
        prompts = batch.prompts or (None,) * len(batch)
        texts = [self._text(prompt, batch.lq.device) for prompt in prompts]
        image = adapter.upsample(batch.lq)
        side = adapter.compression
        one = (adapter.vae.config.latent_channels, image.shape[-2] // side, image.shape[-1] // side)
        with self.part("LQ encode"):
            latents = self._encode(image, self._noise((len(batch), *one), source, image))
        shape = (len(batch) * self._group, *one)
        noise = self._noise(shape, source, image)
        outputs = []
        for row in range(len(noise)):
            z, text = latents[row // self._group][None], texts[row // self._group]
            z_t = adapter.schedule.add_noise(z, noise[row][None], adapter.noise_t)
            with self.part("group sampling"):
                prediction = self.second(z_t, adapter.net_t, text).sample.float()
            with self.part("decode"):
                outputs.append(self._decode(adapter.schedule.x0(z_t, prediction, adapter.net_t)))
        return torch.cat(outputs), shape
