"""The contract: what an image super-resolution pipeline offers to be fine-tuned.

Tensors at every public boundary:
- Images are (B, 3, H, W) float32 RGB in [0, 1]: `lq` at its native size, `hq` the target, `sr` the output, which is
  exactly `scale` times `lq`. [-1, 1] exists only inside adapters, which also upsample, pad and crop.
- Latents are (B, C, h, w) float32, already multiplied by the autoencoder's scaling factor.
- Times `t` are (B,) in the unit of the adapter's schedule (VP: int64 in [0, T); flow: float32 in (0, 1]), or one number
  for all rows.

`rewardsr.batch` has what goes in (`Batch`) and what denoising is conditioned on (`Condition`).

An adapter declares its `Options`, says how to `load`, and writes five hooks (`_encode`, `_start`, `_predict`,
`_to_latents`, `_to_image`); their public namesakes check what they are given and give float32 back. A hook casts what
it hands to a network to that network's precision (`precision_of`): no autocast is on, which would turn every norm of a
bf16 network into float32 and back.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rewardsr.batch import Batch, Condition, parts, pick
from rewardsr.checks import check_image
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError
from rewardsr.options import Options
from rewardsr.schedule import Coefficient, Schedule, Time
from rewardsr.sizes import Sizes
from rewardsr.tiling import Window
from rewardsr.transfer import to_device


@dataclass(frozen=True)
class BaseModel:
    """Which weights an adapter stands on: resolved id or path, revision, and fingerprint of all parts."""

    id: str
    revision: str
    fingerprint: str


class ISRAdapter(Sizes, ABC):
    """A super-resolution pipeline, seen through five hooks.

    Attributes:
        name: registered name of the family.
        Options: what users can set, a subclass of `rewardsr.Options`.
        scale: `sr` is this many times `lq`; 1 for inputs already at output size.
        size_multiple: the upsampled image is padded (replicate) to a multiple of this many pixels.
        schedule: how latents are noised, and what the network's predictions mean.
        steps: times at which the network is called, first to last; one entry means one-step.
        noise_t: a one-step model noises its start latents as of this time; None: it adds no noise.
        networks: all networks that carry weights of the base, by component name ("unet", "vae").
        trainable: those of them that a LoRA sits on.
        encoders: those that `encode` uses: a LoRA there changes the condition, and with it what the reference sees.
        lora_targets: for each of them the module names (suffixes) that the papers adapt.
        encoder_targets: for components of `encoders` that no LoRA sits on otherwise, names of the modules that
            supervised training adapts besides.
        base_model: which weights these are.
        licence: licence of the base weights as far as the adapter knows.
        released: file of the family's own form whose LoRA was merged into the base, if there was one.
        guidance: the pipeline's own classifier-free guidance scale; 1 means none.
        eta: how much noise the sampler draws at each step: 0 none (DDIM, Euler), 1 as much as ancestral DDPM.
        tiling: how latents too large for one network call are sampled; None: they never are cut.
        vae_tile: where no gradient is needed, images of more than so many pixels squared are encoded and decoded in
            tiles of that side; None: never.
        noisy_condition: whether `encode` needs its generator when sampling, too: the condition itself is noised.
        extras: names of the tensors that `Batch.extras` may bring, read from files beside the images.
        network_call: what runs in place of `_predict`, if anything: a run records its calls (`train.graphs`).
        device, dtype: where the networks are, and in which precision they compute; the boundary is float32.
    """

    name: ClassVar[str] = ""
    Options: ClassVar[type[Options]] = Options
    schedule: Schedule
    noise_t: float | None = None
    trainable: dict[str, nn.Module]
    encoders: ClassVar[tuple[str, ...]] = ("vae",)
    lora_targets: dict[str, Sequence[str]]
    encoder_targets: Mapping[str, Sequence[str]] = MappingProxyType({})
    base_model: BaseModel
    licence: str = "unknown"
    released: str | None = None
    guidance: float = 1.0
    eta: float = 0.0
    noisy_condition: bool = False
    extras: ClassVar[tuple[str, ...]] = ()
    network_call: Callable[[Tensor, Tensor, Condition], Tensor] | None = None
    device: torch.device
    dtype: torch.dtype

    @property
    def net_t(self) -> float:
        """Time the network is told in its (last) step; a one-step model may be told less than `noise_t`."""
        return self.steps[-1]

    @property
    def one_step(self) -> bool:
        """Whether sampling is a single network call."""
        return len(self.steps) == 1

    # ---- the five hooks, public side ----

    def encode(
        self, batch: Batch | Tensor, prompts: Sequence[str | None] | None = None, generator: Source | None = None
    ) -> Condition:
        """What denoising is conditioned on.

        Args:
            batch: a Batch, or `lq` (B, 3, h, w) in [0, 1] to be wrapped in one with `prompts`.
            prompts: one text an image; only with a bare `lq`.
            generator: draws the autoencoder's posterior sample and what noise the condition has; None takes the mode.

        Raises:
            UserError: the family needs something of the batch that is not there.
            ValueError: wrong rank, channels, range or dtype, or another number of prompts than images.
        """
        if isinstance(batch, Tensor):
            batch = Batch(lq=batch, prompts=None if prompts is None else tuple(prompts))
        elif prompts is not None:
            raise ValueError("encode: prompts go into the Batch, or beside a bare lq tensor, not both")
        check_image("encode: lq", batch.lq)
        if batch.prompts is not None and len(batch.prompts) != len(batch):
            raise ValueError(f"encode: {len(batch.prompts)} prompts for {len(batch)} images")
        return self._encode(batch.to(self.device), generator)

    def start(self, condition: Condition, generator: Source | None = None) -> Tensor:
        """Latents (B, C, h, w) that denoising starts from: noise, noised LQ latents, or LQ latents.

        Raises:
            ValueError: the pipeline starts from noise and there is no generator.
        """
        if generator is None and not self.deterministic:
            raise ValueError("start: this pipeline starts from noise; pass a generator (rewardsr.Draws)")
        return self._start(condition, generator)

    def predict(self, z_t: Tensor, t: Time, condition: Condition) -> Tensor:
        """One unguided network call: its own prediction (B, C, h, w), which `schedule` reads.

        Args:
            z_t: (B, C, h, w) float32 noisy latents.
            t: (B,) in the schedule's dtype, or a number.
            condition: of the same rows.
        """
        if z_t.ndim != 4 or z_t.shape[0] != len(condition) or z_t.dtype != torch.float32:
            raise ValueError(
                f"predict: expected float32 latents ({len(condition)}, C, h, w), got {z_t.dtype} {tuple(z_t.shape)}"
            )
        if isinstance(t, Tensor):
            times = to_device(t.to(self.schedule.dtype), z_t.device).expand(len(z_t))
        else:
            times = torch.full((len(z_t),), t, dtype=self.schedule.dtype, device=z_t.device)
        return (self.network_call or self._predict)(z_t, times, condition).float()

    def to_latents(self, image: Tensor, generator: Source | None = None) -> Tensor:
        """Encode an image at output size, (B, 3, H, W) in [0, 1], to latents (B, C, h, w); no generator: the mode."""
        check_image("to_latents: image", image)
        padded = self.pad(to_device(image, self.device))
        return self._encoded(
            len(padded), padded.shape[-2:], lambda which, rows, columns: padded[which, :, rows, columns], generator
        )

    def to_image(self, z0: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to an image (B, 3, H', W') of the padded size, unclamped: callers clamp."""
        if z0.ndim != 4 or z0.dtype != torch.float32:
            raise ValueError(f"to_image: expected float32 latents (B, C, h, w), got {z0.dtype} {tuple(z0.shape)}")
        return self._decoded(z0)

    # ---- the five hooks, what an adapter writes; gradients must follow. `Sizes` has _to_latents and _to_image ----

    @abstractmethod
    def _encode(self, batch: Batch, generator: Source | None) -> Condition: ...

    @abstractmethod
    def _start(self, condition: Condition, generator: Source | None) -> Tensor: ...

    @abstractmethod
    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor: ...

    # ---- what every adapter must also say ----

    @classmethod
    @abstractmethod
    def load(cls, base: str, options: Any) -> Self:
        """An adapter on a local diffusers folder or a Hub id, in float32 on the CPU.

        Args:
            base: folder or Hub id.
            options: an instance of the adapter's `Options`.

        Raises:
            UserError: anything that cannot be had, read or fitted.
        """

    @classmethod
    def scale_of(cls, options: Any) -> int | None:
        """`scale` as far as the options tell it before anything is loaded; None: only the loaded pipeline knows."""
        scale: int | None = getattr(options, "scale", None)
        return scale

    @property
    def deterministic(self) -> bool:
        """Whether sampling draws no noise, so that a group of samples would be copies of one."""
        return self.one_step and self.noise_t is None

    def enable_gradient_checkpointing(self) -> list[str]:
        """Trade time for memory where the networks can; returns the components that cannot."""
        return sorted(self.trainable)

    def compiled(self) -> list[nn.Module]:
        """The modules that hooks call and `torch.compile` can take; by default the networks."""
        return list(self.networks.values())

    def import_lora(self, path: str) -> tuple[dict[str, Tensor], int, float] | None:
        """A LoRA in the family's released format: (tensors by our key names, rank, alpha); None if it is not one."""
        return None

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        """Whether `from_pipeline` can take this live pipeline object."""
        return False

    @classmethod
    def from_pipeline(cls, pipe: Any, options: Any) -> Self:
        """An adapter on the networks of a live pipeline object: shared, not copied, and left where they are.

        Args:
            pipe: any object with the networks that the family needs.
            options: an instance of the adapter's `Options`; what it says of loading has no meaning here.

        Raises:
            UserError: the family takes no live pipelines, or the parts do not fit each other.
        """
        raise UserError(f"adapter '{cls.name}' takes no live pipelines: load it from a folder or a Hub id")

    # ---- provided ----

    def __repr__(self) -> str:
        about = f"base={self.base_model.id!r}, scale={self.scale}, steps={len(self.steps)}, {self.schedule}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{type(self).__name__} {about}, LoRA targets: {', '.join(self.trainable)}, {dtype} on {self.device}>"

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Move the networks to a device and a precision; what is trained (a LoRA) goes along unrounded, in float32."""
        self.device, self.dtype = torch.device(device), dtype
        for network in self.networks.values():
            trained = {name: p.data for name, p in network.named_parameters() if p.requires_grad}
            # Past diffusers' own `to`, which warns of float32 modules that these networks do not have.
            nn.Module.to(network, device=self.device, dtype=dtype)
            for name, exact in trained.items():
                network.get_parameter(name).data = exact.to(self.device, torch.float32)
        return self

    def transition(self, z: Tensor, prediction: Tensor, t: float, t_next: float) -> tuple[Tensor, Coefficient]:
        """One step of the sampler from `t` to `t_next` (`schedule.end`: to z0).

        Returns:
            mean (B, C, h, w) and standard deviation of the Gaussian that the next latents are drawn from.
        """
        return self.schedule.transition(z, prediction, t, t_next, self.eta)

    def sample_latents(
        self,
        condition: Condition,
        generator: Source | None = None,
        steps: Sequence[float] | None = None,
        guidance: float | None = None,
        until: Tensor | None = None,
        rows: int | None = None,
    ) -> Tensor:
        """Denoise from `start` to z0 (B, C, h, w), step by step with the family's sampler.

        Args:
            condition: from `encode`.
            generator: source of the start noise, and of the sampler's where it draws some.
            steps: times to call the network at; the pipeline's own by default.
            guidance: classifier-free guidance scale; the pipeline's own by default.
            until: (B,) int64 on the CPU, how many steps each row takes; all by default. A row that stops early is noisy
                still.
            rows: at most so many in a network call, those of guidance and of tiles included.

        Raises:
            ValueError: the sampler draws noise and there is no generator.
        """
        times = tuple(steps) if steps is not None else self.steps
        z = self.start(condition, generator)
        last = [len(times)] * len(z) if until is None else until.tolist()
        for taken, (t, t_next) in enumerate(zip(times, (*times[1:], self.schedule.end), strict=True)):
            going = [row for row, stop in enumerate(last) if stop > taken]
            if not going:
                break
            whole = len(going) == len(z)
            now, where = (z, condition) if whole else (pick(z, going), condition.rows(going))
            moved, std = self.transition(now, self._guided(now, t, where, guidance, rows), t, t_next)
            if isinstance(std, Tensor) or std > 0:
                if generator is None:
                    raise ValueError("sample: this sampler draws noise; pass a generator (rewardsr.Draws)")
                # Drawn for every row, so that a row's noise does not depend on how far the others go.
                noise = draw(z.shape, generator, device=z.device)
                moved = moved + std * (noise if whole else pick(noise, going))
            if not whole:
                ahead = dict(zip(going, moved, strict=True))
                moved = torch.stack([ahead.get(row, z[row]) for row in range(len(z))])
            z = moved
        return z

    def decode(self, z0: Tensor, condition: Condition) -> Tensor:
        """`sr` (B, 3, H, W) in [0, 1] at exactly the size that belongs to the LQ image."""
        height, width = condition.size
        image = self.to_image(z0)[..., :height, :width]
        # What was joined from tiles is large, and nobody else's.
        return image.clamp(0, 1) if self._autoencoder_tiles(*z0.shape[-2:]) is None else image.clamp_(0, 1)

    def sample(
        self,
        condition: Condition,
        generator: Source | None = None,
        steps: Sequence[float] | None = None,
        guidance: float | None = None,
    ) -> Tensor:
        """`sr` (B, 3, H, W) in [0, 1]: `sample_latents`, decoded."""
        return self.decode(self.sample_latents(condition, generator, steps, guidance), condition)

    def _guided(
        self, z: Tensor, t: float, condition: Condition, guidance: float | None, rows: int | None = None
    ) -> Tensor:
        """Prediction of the sampler, u + w (c - u): tiles are stitched first, then guidance is applied, as in SeeSR.

        What is conditioned on the prompt and what on the negative one are rows of one batch.
        """
        weight = self.guidance if guidance is None else guidance
        if weight == 1 or condition.negative is None:
            return self._stitched(z, t, condition, rows)
        negative = replace(condition, text=condition.negative, pooled=condition.negative_pooled)
        both = self._stitched(torch.cat([z, z]), t, condition.beside(negative), rows)
        prediction, unconditional = both.chunk(2)
        return unconditional + weight * (prediction - unconditional)

    def _stitched(self, z: Tensor, t: float, condition: Condition, rows: int | None = None) -> Tensor:
        """Prediction for latents of any size, in network calls of at most `rows` rows."""

        def predict(z: Tensor, condition: Condition) -> Tensor:
            return torch.cat([self.predict(z[part], t, condition.rows(part)) for part in parts(len(z), rows)])

        def tiles(windows: Sequence[Window]) -> Tensor:
            first, *others = (condition.window(*window) for window in windows)
            return predict(torch.cat([z[..., rows, columns] for rows, columns in windows]), first.beside(*others))

        if self.tiling is None or not self.tiling.cuts(z):
            return predict(z, condition)
        return self.tiling.apply(tiles, z)


def precision_of(network: nn.Module) -> torch.dtype:
    """What a network computes in: the dtype of its first weight that is not trained."""
    return next((p for p in network.parameters() if not p.requires_grad), next(network.parameters())).dtype
