"""What Stable-Diffusion-shaped pipelines share: loading the parts, prompts, autoencoder, the UNet call."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rewardsr import options
from rewardsr.adapter import BaseModel, ISRAdapter, precision_of
from rewardsr.adapters._live import check_together, live_network
from rewardsr.adapters._networks import check_tokenizer, decode_in_rows, load_network, read_part, read_tokenizer
from rewardsr.batch import Batch, Condition
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError, one_line, shown
from rewardsr.hub.fetch import fetch
from rewardsr.json_object import read_object
from rewardsr.lora.fingerprint import fingerprint
from rewardsr.schedule import VP
from rewardsr.tiling import Tiling
from rewardsr.transfer import to_device

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CACHED_PROMPTS = 512  # embeddings kept on the device: 160 MB at the width of SD 2.1
LONGEST = 100_000  # times of a schedule
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
# Every convolution and every attention and feed-forward projection of the UNet, as OSEDiff and GDPO-SR adapt them;
# no time embeddings, norms or biases.
UNET_TARGETS = (
    *("conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_out"),
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
)

# Options that several families have, each with a default of its own.
Scale = Annotated[
    int, Field(ge=1, le=64, description="`sr` is this many times `lq`; 1 for inputs already at output size")
]
Steps = Annotated[int, Field(ge=1, le=10_000, description="of the sampler")]
Guidance = Annotated[float, Field(ge=1, le=1000, description="classifier-free guidance scale; 1: none")]
Tile = Annotated[
    int | None, Field(le=65_536, description="latents larger than tile x tile are sampled in tiles; null: never")
]
TileOverlap = Annotated[int, Field(le=65_536, description="of neighbouring tiles, in latents")]
TileBatch = Annotated[int, Field(ge=1, le=65_536, description="tiles of an image in one network call, at most")]
VAETile = Annotated[
    int | None,
    Field(ge=64, le=65_536, description="larger images (in pixels) are en- and decoded in tiles; null: never"),
]


@dataclass
class Parts:
    """The parts of a pipeline; in float32 on the CPU when loaded, where and as they are when taken from a live one.

    Attributes:
        scheduler: the configuration of the pipeline's scheduler.
        revision: of the repository, "local" for a folder, "live" for a pipeline in memory.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Mapping[str, Any]
    revision: str


def load_parts(base: str, revision: str | None = None, unet: Any = None) -> Parts:
    """Load the parts of an SD-shaped diffusers folder or Hub repository.

    Args:
        base: the folder, or the Hub id.
        revision: branch, tag or commit of a Hub base.
        unet: the UNet, where the family has loaded it from elsewhere; the base need not hold one then.

    Raises:
        UserError: it cannot be had, a part is missing or damaged, or the parts do not fit each other.
    """
    needed = PARTS if unet is None else tuple(part for part in PARTS if part != "unet")
    folder, resolved = fetch(base, "base", needed, revision, outlines=True)
    for part in needed:
        if not (folder / part).is_dir():
            raise UserError(f"base '{base}' has no folder '{part}/': expected a diffusers pipeline folder")
    from transformers import CLIPTextModel

    scheduler = scheduler_config(folder / "scheduler")
    parts = Parts(
        unet=load_network(folder / "unet") if unet is None else unet,
        vae=load_network(folder / "vae"),
        text_encoder=read_part(folder / "text_encoder", CLIPTextModel),
        tokenizer=read_tokenizer(folder / "tokenizer"),
        scheduler=scheduler,
        revision=resolved,
    )
    check_fit(base, parts)
    return parts


def parts_of(pipe: Any) -> tuple[Parts, str]:
    """The parts of a live pipeline, shared and not copied, and what to call it.

    Raises:
        UserError: a part is missing, does not fit, or can carry no LoRA (it has one, or was quantised, offloaded, ...).
    """
    kind = type(pipe).__name__
    found = getattr(pipe, "scheduler", None) or getattr(pipe, "noise_scheduler", None)  # the latter in OSEDiff's own
    lacking = [part for part in PARTS if part != "scheduler" and getattr(pipe, part, None) is None]
    if lacking or found is None:
        raise UserError(f"{kind} has no {(*lacking, 'scheduler')[0]}")
    networks = [part for part in ("unet", "vae", "controlnet") if getattr(pipe, part, None) is not None]
    unet, vae, *_ = (live_network(pipe, part) for part in networks)
    text_encoder = live_network(pipe, "text_encoder", mixed=True)
    check_together(pipe, networks)
    name = str(getattr(unet.config, "_name_or_path", "") or kind)
    scheduler = {"_class_name": type(found).__name__, **getattr(found, "config", {})}
    check_scheduler(scheduler, kind)
    parts = Parts(unet, vae, text_encoder, pipe.tokenizer, scheduler, "live")
    check_fit(name, parts)
    return parts, name


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The configuration of a scheduler from its folder.

    Raises:
        UserError: it is missing or damaged, or `check_scheduler` refuses it.
    """
    path = folder / "scheduler_config.json"
    config = read_object(path)
    check_scheduler(config, str(path))
    return config


def check_scheduler(config: Mapping[str, Any], where: str) -> None:
    """Refuse a schedule that the arithmetic here does not cover.

    Raises:
        UserError: no schedule of betas, none that makes noise of images, one that ends in pure noise, or another
            prediction type than epsilon and v.
    """
    kind, betas = config.get("_class_name", "scheduler"), config.get("beta_schedule")
    # A schedule that is not of betas (flow matching) names none, and leaving it out does not mean scaled_linear either.
    if betas not in BETA_SCHEDULES:
        expected = ", ".join(BETA_SCHEDULES)
        raise UserError(f"'{where}': {kind} has beta_schedule {shown(betas)}, expected one of {expected}")
    for option in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(option):
            raise UserError(f"'{where}': {kind} sets {option}, which is not supported")
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise UserError(f"'{where}': prediction type {shown(config['prediction_type'])} is not epsilon or v_prediction")
    count = config.get("num_train_timesteps", 1000)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= LONGEST:
        raise UserError(f"'{where}': num_train_timesteps is {shown(count)}, expected 1 to {LONGEST}")
    try:
        scheduler = make_scheduler(config)
        scheduler.set_timesteps(1)
        left = torch.cat([torch.ones(1), scheduler.alphas_cumprod, torch.zeros(1)])
    except Exception as error:  # diffusers checks configurations in ways of its own
        raise UserError(f"'{where}' makes no schedule: {one_line(error)}") from error
    if not (left.diff() < 0).all():  # also false for NaN
        raise UserError(f"'{where}': its betas make no schedule, from little noise to much: expected 0 < betas < 1")


def make_scheduler(config: Mapping[str, Any]) -> Any:
    """diffusers' DDPM scheduler of a configuration that may be another scheduler's: for its noise and its times."""
    from diffusers import DDPMScheduler

    known = inspect.signature(DDPMScheduler.__init__).parameters
    return DDPMScheduler(**{name: value for name, value in config.items() if name in known})


def times(config: Mapping[str, Any], count: int) -> tuple[int, ...]:
    """The times of a sampler of `count` steps, spaced as the configuration says.

    Raises:
        UserError: more steps than the schedule has.
    """
    scheduler = make_scheduler(config)
    if count > scheduler.config.num_train_timesteps:
        raise UserError(f"steps is {count}, expected 1 to {scheduler.config.num_train_timesteps}")
    scheduler.set_timesteps(count)
    # With an offset and very many steps the first time lies one past the end.
    return tuple(min(int(time), scheduler.config.num_train_timesteps - 1) for time in scheduler.timesteps)


def check_fit(base: str, parts: Parts) -> None:
    """Refuse parts of different sizes.

    Raises:
        UserError: UNet, autoencoder and text encoder do not fit each other.
    """
    for network, names in (
        (parts.vae, ("latent_channels", "scaling_factor")),
        (parts.unet, ("in_channels", "out_channels", "cross_attention_dim")),
    ):
        lacking = [name for name in names if name not in network.config]
        if lacking:
            raise UserError(f"base '{base}': {type(network).__name__} has no {lacking[0]}: not a Stable Diffusion part")
    factor = parts.vae.config.scaling_factor
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise UserError(f"base '{base}': scaling_factor of the VAE is {shown(factor)}, expected a positive number")
    check_tokenizer(base, parts.tokenizer, parts.text_encoder)
    latents, given = parts.vae.config.latent_channels, parts.unet.config.out_channels
    if given != latents:
        raise UserError(f"base '{base}': the UNet gives {given} channels, but the latents have {latents}")
    width, cross = parts.text_encoder.config.hidden_size, parts.unet.config.cross_attention_dim
    if width != cross:
        raise UserError(f"base '{base}': the text encoder is {width} wide, but the UNet attends to {cross}")


class StableDiffusion(ISRAdapter):
    """Common ground of adapters on SD-shaped parts; a family adds `_start`, its times and what else it encodes.

    Args:
        parts: loaded, or taken from a live pipeline.
        base: id or path of the base weights.
        options: of the family.
        scale: `sr` is this many times `lq`.
        more: networks that the family has besides, by component.

    Attributes:
        extra_channels: what the UNet takes beside the latents.
    """

    class Options(options.Options):
        """Options of every family; most have a `Scale`, too."""

        prompt: str = Field("", description="text for images that bring none")
        tile: Tile = 96
        tile_overlap: TileOverlap = 32
        tile_batch: TileBatch = 4
        vae_tile: VAETile = 1024
        revision: str | None = Field(None, description="branch, tag or commit of a Hub base")

        def tiling(self) -> Tiling | None:
            """How latents are cut."""
            return None if self.tile is None else Tiling(self.tile, self.tile_overlap, self.tile_batch)

        @model_validator(mode="after")
        def _tiles_fit(self) -> Self:
            self.tiling()
            return self

    extra_channels: ClassVar[int] = 0
    options: Options

    def __init__(
        self, parts: Parts, base: str, options: Options, scale: int, more: Mapping[str, nn.Module] | None = None
    ) -> None:
        taken = parts.unet.config.in_channels
        if taken != parts.vae.config.latent_channels + self.extra_channels:
            raise UserError(
                f"base '{base}': the UNet takes {taken} channels, but adapter '{self.name}' gives it "
                f"{parts.vae.config.latent_channels} of latents and {self.extra_channels} more"
            )
        self.unet, self.vae = parts.unet, parts.vae
        self.options, self.scale, self.tiling, self.vae_tile = options, scale, options.tiling(), options.vae_tile
        self.size_multiple = compression(parts.vae)
        self.networks = {"unet": self.unet, **(more or {}), "vae": self.vae}
        self.trainable = {"unet": self.unet}
        self.lora_targets = {"unet": UNET_TARGETS}
        weight = next(self.unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        prediction = parts.scheduler.get("prediction_type", "epsilon")
        self.schedule = VP(make_scheduler(parts.scheduler).alphas_cumprod, prediction)
        self._text_encoder, self._tokenizer = parts.text_encoder, parts.tokenizer
        self._embeddings: dict[str, Tensor] = {}
        for network in (*self.networks.values(), self._text_encoder):
            network.requires_grad_(False)
            network.eval()
        decode_in_rows(self.vae)
        weights = {**self.networks, "text_encoder": parts.text_encoder, "tokenizer": parts.tokenizer}
        self.base_model = BaseModel(base, parts.revision, fingerprint(weights))

    @property
    def compression(self) -> int:
        """How many pixels a latent is wide."""
        return compression(self.vae)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Move networks and text encoder to a device and a precision; what is trained goes along in float32."""
        self._text_encoder.to(device=device, dtype=dtype)
        self._embeddings.clear()
        return super().to(device, dtype)

    def enable_gradient_checkpointing(self) -> list[str]:
        """Checkpoint UNet and autoencoder; returns those whose class cannot (AutoencoderDC cannot)."""
        refused = []
        network: Any
        for name, network in self.networks.items():
            try:
                network.enable_gradient_checkpointing()
            except ValueError:
                refused.append(name)
        return refused

    def compiled(self) -> list[nn.Module]:
        """The networks; of the autoencoder its two halves, for it is called by other methods than `forward`."""
        others = [network for name, network in self.networks.items() if name != "vae"]
        return [*others, self.vae.encoder, self.vae.decoder]

    def _text(self, prompts: Sequence[str | None] | None, count: int) -> Tensor:
        """(count, L, D) float32 embeddings; the new ones among the prompts are encoded together, and each once."""
        given = prompts if prompts is not None else (None,) * count
        wanted = [self.options.prompt if prompt is None else prompt for prompt in given]
        new = [prompt for prompt in dict.fromkeys(wanted) if prompt not in self._embeddings]
        if new:
            # A tokenizer without its own config file names no length.
            length = min(self._tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings)
            ids = self._tokenizer(
                new, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            with torch.no_grad():
                embedded = self._text_encoder(to_device(ids, self._text_encoder.device))[0].float()
            self._embeddings |= dict(zip(new, to_device(embedded, self.device), strict=True))
        text = torch.stack([self._embeddings[prompt] for prompt in wanted])
        while len(self._embeddings) > CACHED_PROMPTS:  # one prompt an image, over a large set, would fill the card
            del self._embeddings[next(iter(self._embeddings))]
        return text

    def _encode(self, batch: Batch, generator: Source | None) -> Condition:
        height, width = batch.lq.shape[-2:]
        return Condition(
            text=self._text(batch.prompts, len(batch)),
            latents=self.lq_latents(batch.lq, generator),
            size=(height * self.scale, width * self.scale),
        )

    def _predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        precision = precision_of(self.unet)
        return self.unet(z_t.to(precision), t, condition.text.to(precision)).sample

    def _to_latents(self, image: Tensor, generator: Source | None) -> Tensor:
        encoded = self.vae.encode((image * 2 - 1).to(precision_of(self.vae)))
        if hasattr(encoded, "latent"):  # autoencoders without a posterior (AutoencoderDC)
            latents = encoded.latent.float()
        else:
            posterior = encoded.latent_dist
            latents = posterior.mean.float()
            if generator is not None:
                latents = latents + posterior.std.float() * draw(latents.shape, generator, device=latents.device)
        return latents * self.vae.config.scaling_factor

    def _to_image(self, z0: Tensor) -> Tensor:
        image = self.vae.decode((z0 / self.vae.config.scaling_factor).to(precision_of(self.vae))).sample
        return image.float() / 2 + 0.5


class ReleasedTiles(StableDiffusion.Options):
    """Options of families whose released code cuts latents, too."""

    tile_weights: Literal["centred", "original"] = Field(
        "centred", description="original: half a latent pixel too low, as released"
    )

    def tiling(self) -> Tiling | None:
        """How latents are cut."""
        tiling = super().tiling()
        return tiling and replace(tiling, off_centre=self.tile_weights == "original")


class Ancestral(StableDiffusion):
    """Common ground of families that take many steps of ancestral DDPM (eq. 6 and 7), starting near the LQ image."""

    class Options(ReleasedTiles):
        """Options of SeeSR and StableSR."""

        scale: Scale = 4
        start_point: Literal["lq", "noise"] = Field(
            "lq",
            description="lq: the LQ latents, noised as of the schedule's last time; noise: noise alone",
            json_schema_extra=options.FOR_LORA,
        )

    noisy_condition = True
    eta = 1.0
    options: Options

    @property
    def deterministic(self) -> bool:
        """Never: it starts from noise, or from LQ latents that are noised."""
        return False

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        assert generator is not None  # `start` has seen to it
        noise = draw(condition.latents.shape, generator, device=condition.latents.device)
        if self.options.start_point == "noise":
            return noise
        return self.schedule.add_noise(condition.latents, noise, self.schedule.last)


def compression(vae: Any) -> int:
    """How many pixels a latent is wide."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio) if ratio is not None else 2 ** (len(vae.config.block_out_channels) - 1)
