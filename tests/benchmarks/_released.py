"""The arithmetic of the released training steps, in our own words, on our networks: what ours is measured against.

As the papers' code runs it: every prompt is encoded every time it is used; outputs are sampled one after the other; the
reference is a second network with weights of its own; and everything runs under autocast. What the code does beside the
arithmetic (taggers, files, logs) is left out, and so are the rewards, which are the caller's. Where a fact is not
known, the cheaper reading is taken: networks in `adapter.dtype`, no gradients towards weights that are not trained.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.batch import Batch
from rewardsr.draws import Source, draw
from rewardsr.rewards.distances import STYLE_WEIGHTS, gram, haar_low
from rewardsr.rewards.vgg import LAYERS
from rewardsr.trainers.preferences import group_advantages
from rewardsr.trainers.rfsr import FINE

NEGATIVE = "dotted, noise, blur, lowres, smooth"  # encoded beside every prompt, and never used
DECAY = 0.999  # of RFSR's moving average
Part = Callable[[str], AbstractContextManager[Any]]


class Released:
    """The network calls of a released step.

    Args:
        method: ours, on an adapter of the Stable Diffusion family with our LoRA: its rewards and options are used.
        second: the reference, a plain UNet with weights of its own.
        part: told which part of the step begins (`_meter.Meter.part`).

    Attributes:
        trained: the weights that are.
        averages: pairs of a moving average and what it follows.
    """

    def __init__(self, method: Any, second: Any, part: Part | None = None) -> None:
        self.method, self.adapter, self.second = method, method.adapter, second
        self.part = part or (lambda name: nullcontext())
        self.trained: list[Tensor] = list(method.trained_weights().values())
        self.averages: list[tuple[Tensor, Tensor]] = []

    def holds(self) -> Iterator[Tensor]:
        """What stays between steps, beside the adapter's networks."""
        yield from self.second.parameters()
        yield from (average for average, _ in self.averages)

    @torch.no_grad()
    def after_update(self) -> None:
        """The moving averages."""
        if self.averages:
            averages, values = zip(*self.averages, strict=True)
            torch._foreach_lerp_(averages, values, 1 - DECAY)

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
    """GDPO-SR's step: outputs of each image under the second UNet, judged, and compared after noise was added to them.

    Attributes:
        judge: advantages (B, G) of outputs (B*G, 3, H, W) of a batch.
    """

    def __init__(self, method: Any, second: Any, part: Part | None = None) -> None:
        super().__init__(method, second, part)
        self.judge = partial(_advantages, method)

    def _forward(self, batch: Batch, sampling: Source, update: Source) -> tuple[Tensor, tuple[Tensor, ...]]:
        adapter, options, device = self.adapter, self.method.options, batch.lq.device
        sr, shape = self._sample(batch, sampling)
        with self.part("rewards"):
            advantages = self.judge(sr, batch)
        prompts = batch.repeat(options.group_size).prompts or (None,) * len(sr)
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
        inside = -options.beta / 2 * ((advantages * ours).sum(1) - (advantages * theirs).sum(1))
        return -F.logsigmoid(inside).mean(), (kept, also_kept)

    @torch.no_grad()
    def _sample(self, batch: Batch, source: Source) -> tuple[Tensor, tuple[int, ...]]:
        """Outputs (B*G, 3, H, W) one after the other, and the shape of their latents."""
        adapter, group = self.adapter, self.method.options.group_size
        prompts = batch.prompts or (None,) * len(batch)
        texts = [self._text(prompt, batch.lq.device) for prompt in prompts]
        image = adapter.upsample(batch.lq)
        side = adapter.compression
        one = (adapter.vae.config.latent_channels, image.shape[-2] // side, image.shape[-1] // side)
        with self.part("LQ encode"):
            latents = self._encode(image, self._noise((len(batch), *one), source, image))
        shape = (len(batch) * group, *one)
        noise = self._noise(shape, source, image)
        outputs = []
        for row in range(len(noise)):
            z, text = latents[row // group][None], texts[row // group]
            z_t = adapter.schedule.add_noise(z, noise[row][None], adapter.noise_t)
            with self.part("group sampling"):
                prediction = self.second(z_t, adapter.net_t, text).sample.float()
            with self.part("decode"):
                outputs.append(self._decode(adapter.schedule.x0(z_t, prediction, adapter.net_t)))
        return torch.cat(outputs), shape


def _advantages(method: Any, sr: Tensor, batch: Batch) -> Tensor:
    group, ones = method.options.group_size, torch.ones(len(batch), device=sr.device)
    members = batch.repeat(group)
    scores = {name: reward(sr, members).float().unflatten(0, (-1, group)) for name, reward in method.rewards.items()}
    return group_advantages(scores, {name: ones * method.weights[name] for name in scores})


class RFSRStep(Released):
    """RFSR's step on a one-step pipeline: HQ is encoded, too, and thrown away; a second UNet sets the style.

    All terms that the method has a window for act on all images.
    """

    def __init__(self, method: Any, second: Any, part: Part | None = None) -> None:
        super().__init__(method, second, part)
        self.averages = [(value.detach().clone(), value) for value in self.trained]

    def _forward(self, batch: Batch, sampling: Source, update: Source) -> tuple[Tensor, tuple[Tensor, ...]]:
        adapter, method, device, count = self.adapter, self.method, batch.lq.device, len(batch)
        assert batch.hq is not None
        place = draw((count, 1), sampling, high=len(method._enabled)).flatten()
        t = adapter.schedule.times(adapter.steps)[method._enabled[place]].to(device)
        dropped = draw((count, 1), sampling, high=FINE).flatten() < method.options.text_dropout * FINE
        prompts = batch.prompts or (None,) * count
        text = torch.cat(
            [self._text("" if drop else prompt, device) for prompt, drop in zip(prompts, dropped, strict=True)]
        )
        image = adapter.upsample(batch.lq)
        one = (adapter.vae.config.latent_channels, *(side // adapter.compression for side in image.shape[-2:]))
        with self.part("HQ encode"):
            self._encode(batch.hq, torch.zeros(count, *one, device=device))
        with self.part("LQ encode"):
            latents = self._encode(image, self._noise((count, *one), sampling, image))
        z_t = self._start(latents, sampling)
        sr, judged = self._policy(z_t, t, text, image, batch)
        terms = []
        if "structure" in method.windows:
            bands = [haar_low(image, method.options.structure_level) for image in (sr, batch.hq)]
            terms.append(method.options.structure_weight * (bands[0] - bands[1]).abs().mean())
        if "reward" in method.windows:
            with self.part("rewards"):
                for name, reward in method.rewards.items():
                    terms.append(method.weights[name] * (method.options.margin - reward(sr, batch)).relu().mean())
        if "kl" in method.windows:
            with torch.no_grad():
                with self.part("reference forward"):
                    prediction = judged()
                with self.part("reference decode"):
                    reference = self._decode(adapter.schedule.x0(z_t, prediction, t))
                with self.part("style"):
                    target = features(method._vgg, reference)
            with self.part("style"):
                made = features(method._vgg, sr)
            gaps = (w * (gram(made[n]) - gram(target[n])).abs().mean() for n, w in STYLE_WEIGHTS.items())
            terms.append(method.options.kl_weight * torch.stack(list(gaps)).sum())
        return torch.stack(terms).sum(), ()

    def _start(self, latents: Tensor, source: Source) -> Tensor:
        """Latents that enter the one step that is taken, whichever it is."""
        if self.adapter.noise_t is None:
            return latents
        noise = self._noise(tuple(latents.shape), source, latents)
        return self.adapter.schedule.add_noise(latents, noise, self.adapter.noise_t)

    def _policy(
        self, z_t: Tensor, t: Tensor, text: Tensor, image: Tensor, batch: Batch
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """`sr` of one step, with gradients, and what gives the reference's prediction of it."""
        with self.part("policy forward"):
            prediction = self.adapter.unet(z_t, t, text).sample.float()
        with self.part("decode"):
            sr = self._decode(self.adapter.schedule.x0(z_t, prediction, t))
        return sr, lambda: self.second(z_t, t, text).sample.float()


class SeeSRStep(RFSRStep):
    """RFSR's step on SeeSR, whose ControlNet and image attentions are trained in full, from float32 weights.

    No rollout: the start latents go in at every step. The reference is plain Stable Diffusion, with what the
    ControlNet gave the policy.

    Args:
        unet, controlnet: SeeSR's, float32; frozen here as far as they are not trained.
    """

    def __init__(self, method: Any, second: Any, unet: Any, controlnet: Any, part: Part | None = None) -> None:
        super().__init__(method, second, part)
        self.unet, self.controlnet = unet.requires_grad_(False).eval(), controlnet.requires_grad_(True).eval()
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".image_attentions." in name)
        values = [*controlnet.parameters(), *unet.parameters()]
        self.trained = [value for value in values if value.requires_grad]
        self.averages = [(value.detach().clone(), value) for value in values]

    def holds(self) -> Iterator[Tensor]:
        """Also the two networks."""
        yield from super().holds()
        yield from (value for _, value in self.averages)

    def _start(self, latents: Tensor, source: Source) -> Tensor:
        noise = self._noise(tuple(latents.shape), source, latents)
        return self.adapter.schedule.add_noise(latents, noise, self.adapter.schedule.last)

    def _policy(
        self, z_t: Tensor, t: Tensor, text: Tensor, image: Tensor, batch: Batch
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        self.unet.image_tokens = self.controlnet.image_tokens = batch.extras["ram"]
        with self.part("policy forward"):
            down, middle = self.controlnet(z_t, t, text, image, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            prediction = self.unet(z_t, t, text, **added).sample.float()
        with self.part("decode"):
            sr = self._decode(self.adapter.schedule.x0(z_t, prediction, t))
        return sr, lambda: self.second(z_t, t, text, **added).sample.float()


def features(vgg: Any, image: Tensor) -> dict[str, Tensor]:
    """VGG19's, as `rewardsr.rewards.vgg` has them, but under autocast where that is on."""
    x, found = (image - vgg.mean) / vgg.std, {}
    for place, module in enumerate(vgg.features[: max(LAYERS) + 1]):
        x = module(x)
        if place in LAYERS:
            found[LAYERS[place]] = x
    return found
