"""What Stable-Diffusion-shaped pipelines share: loading the parts, prompts, autoencoder, the UNet call."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from rewardsr import schedule
from rewardsr.adapter import BaseModel, Condition, ISRAdapter
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError
from rewardsr.fingerprint import fingerprint
from rewardsr.hub import fetch
from rewardsr.lora import keep_float32
from rewardsr.quiet import hush

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CACHED_PROMPTS = 512  # embeddings kept on the device: 160 MB at the width of SD 2.1
# Every convolution and every attention and feed-forward projection of the UNet, as OSEDiff and GDPO-SR adapt them;
# no time embeddings, norms or biases.
UNET_TARGETS = (
    *("conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_out"),
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
)


@dataclass
class Parts:
    """The loaded parts of a diffusers folder, in float32 on the CPU."""

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    alphas_cumprod: Tensor
    prediction_type: str
    path: Path
    revision: str


def load_parts(base: str, revision: str | None = None) -> Parts:
    """Load the parts of an SD-shaped diffusers folder or Hub repository.

    Raises:
        UserError: it cannot be had, a part is missing or damaged, or the parts do not fit each other.
    """
    folder, resolved = fetch(base, "base", PARTS, revision)
    for part in PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"base '{base}' has no folder '{part}/': expected a diffusers pipeline folder")
    hush()
    from transformers import CLIPTextModel, CLIPTokenizer

    scheduler = _scheduler_config(folder)
    parts = Parts(
        unet=load_network(folder / "unet"),
        vae=load_network(folder / "vae"),
        text_encoder=_guarded(folder / "text_encoder", CLIPTextModel),
        tokenizer=_guarded(folder / "tokenizer", CLIPTokenizer),
        alphas_cumprod=schedule.alphas_cumprod(
            scheduler.get("beta_start", 0.00085),
            scheduler.get("beta_end", 0.012),
            scheduler.get("num_train_timesteps", 1000),
        ),
        prediction_type=scheduler.get("prediction_type", "epsilon"),
        path=folder,
        revision=resolved,
    )
    check_fit(base, parts)
    return parts


def load_network(folder: Path) -> Any:
    """A diffusers network in float32 from its folder; the class is the one that its config names."""
    import diffusers

    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"'{folder}' has no config.json: expected a diffusers network folder")
    try:
        name = json.loads(config.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{config}' is damaged or names no class") from error
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise UserError(
            f"'{config}' names the class '{name}', which is no network of diffusers {diffusers.__version__}"
        )
    return _guarded(folder, kind)


def _guarded(folder: Path, kind: Any) -> Any:
    """`from_pretrained` of a local folder, its many ways to fail turned into one line."""
    options: dict[str, Any] = {"local_files_only": True}
    if issubclass(kind, nn.Module):
        options |= {"torch_dtype": torch.float32, "use_safetensors": True}
    try:
        return kind.from_pretrained(folder, **options)
    except Exception as error:  # diffusers, transformers and safetensors share no error class
        raise UserError(f"'{folder}' does not load as {kind.__name__}: {' '.join(str(error).split())[:300]}") from error


def _scheduler_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"'{folder}/scheduler/scheduler_config.json' is missing or damaged") from error
    kind = config.get("_class_name", "scheduler")
    # A schedule that is not of betas (flow matching) names none, and leaving it out does not mean scaled_linear either.
    if config.get("beta_schedule") != "scaled_linear":
        raise UserError(
            f"'{folder}': {kind} has beta_schedule '{config.get('beta_schedule')}', only scaled_linear is supported"
        )
    for option in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(option):
            raise UserError(f"'{folder}': {kind} sets {option}, which is not supported")
    if config.get("prediction_type", "epsilon") not in {"epsilon", "v_prediction"}:
        raise UserError(f"'{folder}': prediction type '{config['prediction_type']}' is not epsilon or v_prediction")
    return config


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
    latents, channels = parts.vae.config.latent_channels, parts.unet.config.in_channels
    if latents != channels or parts.unet.config.out_channels != latents:
        raise UserError(f"base '{base}': the UNet takes {channels} channels, but the latents have {latents}")
    width, cross = parts.text_encoder.config.hidden_size, parts.unet.config.cross_attention_dim
    if width != cross:
        raise UserError(f"base '{base}': the text encoder is {width} wide, but the UNet attends to {cross}")


class StableDiffusion(ISRAdapter):
    """Common ground of adapters on SD-shaped parts; a family adds `_start`, its times and what it encodes."""

    def __init__(self, parts: Parts, base: str, scale: int, prompt: str) -> None:
        if scale < 1:
            raise UserError(f"scale is {scale}, expected 1 or more")
        self.unet, self.vae = parts.unet, parts.vae
        self.scale, self.prompt = scale, prompt
        self.alphas_cumprod = parts.alphas_cumprod
        self.size_multiple = _compression(parts.vae)
        self.networks = {"unet": self.unet, "vae": self.vae}
        self.trainable = {"unet": self.unet}
        self.lora_targets = {"unet": UNET_TARGETS}
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._text_encoder, self._tokenizer = parts.text_encoder, parts.tokenizer
        self._embeddings: dict[str, Tensor] = {}
        self._v_prediction = parts.prediction_type == "v_prediction"
        for network in (*self.networks.values(), self._text_encoder):
            network.requires_grad_(False)
            network.eval()
        self.base_model = BaseModel(base, parts.revision, fingerprint(self.networks))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Move UNet and autoencoder; the text encoder stays on the CPU until a new prompt turns up."""
        self.device, self.dtype = torch.device(device), dtype
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        with keep_float32(self):
            for network in self.networks.values():
                # Past diffusers' own `to`, which warns of float32 modules that these networks do not have.
                nn.Module.to(network, device=self.device, dtype=dtype, memory_format=layout)  # type: ignore[call-overload]
        self._embeddings = {prompt: embedding.to(self.device) for prompt, embedding in self._embeddings.items()}
        self.alphas_cumprod = self.alphas_cumprod.to(self.device)
        return self

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

    def _text(self, prompts: Sequence[str] | None, count: int) -> Tensor:
        """(count, L, D) float32 embeddings; each prompt is encoded once, then the text encoder leaves the device."""
        wanted = tuple(prompts) if prompts is not None else (self.prompt,) * count
        new = [prompt for prompt in dict.fromkeys(wanted) if prompt not in self._embeddings]
        if new:
            # A tokenizer without its own config file names no length.
            length = min(self._tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings)
            ids = self._tokenizer(
                new, max_length=length, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            self._text_encoder.to(self.device)
            with torch.no_grad():
                embedded = self._text_encoder(ids.to(self.device))[0].float()
            self._text_encoder.to("cpu")
            self._embeddings |= dict(zip(new, embedded, strict=True))
        text = torch.stack([self._embeddings[prompt] for prompt in wanted])
        while len(self._embeddings) > CACHED_PROMPTS:  # one prompt an image, over a large set, would fill the card
            del self._embeddings[next(iter(self._embeddings))]
        return text

    def _predict_eps(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with self._autocast():
            prediction = self.unet(z_t.to(self.dtype), t, condition.text.to(self.dtype)).sample.float()
        return schedule.eps_from_v(z_t, prediction, t, self.alphas_cumprod) if self._v_prediction else prediction

    def _to_latents(self, image: Tensor, generator: Source | None) -> Tensor:
        with self._autocast():
            encoded = self.vae.encode((image * 2 - 1).to(self.dtype))
        if hasattr(encoded, "latent"):  # autoencoders without a posterior (AutoencoderDC)
            latents = encoded.latent.float()
        else:
            posterior = encoded.latent_dist
            latents = posterior.mean.float()
            if generator is not None:
                latents = latents + posterior.std.float() * draw(latents.shape, generator, device=latents.device)
        return latents * self.vae.config.scaling_factor

    def _to_image(self, z0: Tensor) -> Tensor:
        with self._autocast():
            image = self.vae.decode((z0 / self.vae.config.scaling_factor).to(self.dtype)).sample
        return image.float() / 2 + 0.5

    def _autocast(self) -> torch.autocast:
        """The one numeric path of training and inference: base weights in `dtype`, a float32 LoRA computing in it."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)


def _compression(vae: Any) -> int:
    """How many pixels a latent is wide."""
    ratio = getattr(vae, "spatial_compression_ratio", None)
    return int(ratio) if ratio is not None else 2 ** (len(vae.config.block_out_channels) - 1)
