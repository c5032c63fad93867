"""OSEDiff, and the noise-aware one-step base of GDPO-SR (`noise_t=250, net_t=100`), on any SD-2.1-shaped folder.

Sources: OSEDiff (arXiv 2406.08177), GDPO-SR (arXiv 2603.16769). The upsampled LQ image is encoded; its latents are
noised as of `noise_t` (OSEDiff: not at all), the UNet is told `net_t`, and one step gives the latents of `sr`.
"""

import re
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import Tensor

from rewardsr import lora
from rewardsr.adapters._networks import encoder_layers, load_network
from rewardsr.adapters.stable_diffusion import (
    Parts,
    ReleasedTiles,
    Scale,
    StableDiffusion,
    check_fit,
    load_parts,
    parts_of,
)
from rewardsr.batch import Condition
from rewardsr.draws import Source, draw
from rewardsr.errors import UserError, shown
from rewardsr.hub.fetch import fetch
from rewardsr.lora.pairs import Pair, even, floats, side_by_side
from rewardsr.options import FOR_LORA
from rewardsr.run_folder import FULL, LORA
from rewardsr.storage import expand
from rewardsr.weights import read_pickle

# The released checkpoints never set lora_alpha, so peft's default of 8 holds at every rank.
RELEASED_ALPHA = 8.0
_LORA_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])\.(?P<name>default_\w+)\.weight")
_PARTS = ("state_dict_unet", "state_dict_vae")


class OSEDiff(StableDiffusion):
    """One-step super-resolution on Stable Diffusion parts."""

    name = "osediff"

    class Options(ReleasedTiles):
        """Options of OSEDiff and of GDPO-SR's one-step base."""

        scale: Scale = 4
        weights: str | None = Field(
            None,
            description="what was trained on the base: a folder or Hub id with merged `unet/` and, where it was "
            "trained, `vae/`; or, merged in float32, the folder of a run (trainer naosd) or its LoRA, or a released "
            "`.pkl` (OSEDiff, GDPO-SR; read without running code)",
        )
        noise_t: int | None = Field(
            None,
            description="the latents are noised as of this time (GDPO-SR: 250); null: not at all (OSEDiff)",
            json_schema_extra=FOR_LORA,
        )
        net_t: int | None = Field(
            None,
            description="time that the UNet is told; null: 100 with noise_t, 999 without",
            json_schema_extra=FOR_LORA,
        )

    options: Options

    @classmethod
    def load(cls, base: str, options: Options) -> Self:
        """Load the pipeline, and merge into it what was trained."""
        parts = load_parts(base, options.revision)
        identity, released, weights = base, None, options.weights
        if weights is not None:
            identity = f"{base} + {weights}"
            if _is_run(weights):
                lora.merge_saved(cls(parts, base, options), weights)
            elif expand(weights).is_file():
                released = str(expand(weights))
                _merge_release(parts.unet, parts.vae, Path(released))
            else:
                folder, _ = fetch(weights, "weights", ("unet", "vae"), outlines=True)
                if not (folder / "unet").is_dir():
                    raise UserError(f"weights '{weights}': expected a run, a released .pkl, or a folder with unet/")
                parts.unet = load_network(folder / "unet")
                if (folder / "vae").is_dir():
                    parts.vae = load_network(folder / "vae")
                check_fit(weights, parts)
        adapter = cls(parts, identity, options)
        adapter.released = released
        return adapter

    @classmethod
    def fits(cls, pipe: Any) -> bool:
        """Whether the pipeline is plain Stable Diffusion: a UNet that takes latents only, and no ControlNet."""
        unet, vae = getattr(pipe, "unet", None), getattr(pipe, "vae", None)
        taken = getattr(getattr(unet, "config", None), "in_channels", None)
        latents = getattr(getattr(vae, "config", None), "latent_channels", None)
        more = any(getattr(pipe, part, None) is not None for part in ("controlnet", "text_encoder_2"))
        return taken is not None and taken == latents and not more

    @classmethod
    def from_pipeline(cls, pipe: Any, options: Options) -> Self:
        """An adapter on a live pipeline, whose networks carry what was trained already (OSEDiff's LoRA merged in)."""
        if not cls.fits(pipe):
            raise UserError(
                f"{type(pipe).__name__} is more than plain Stable Diffusion: it has a controlnet or a second text "
                "encoder, or its UNet takes more than latents"
            )
        parts, identity = parts_of(pipe)
        return cls(parts, identity, options)

    def __init__(self, parts: Parts, base: str, options: Options) -> None:
        net_t = options.net_t if options.net_t is not None else 999 if options.noise_t is None else 100
        super().__init__(parts, base, options.model_copy(update={"net_t": net_t}), options.scale)
        for option, time in (("noise_t", options.noise_t), ("net_t", net_t)):
            if time is not None and not 0 <= time <= self.schedule.last:
                raise UserError(f"{option} is {time}, expected 0 to {self.schedule.last}")
        self.steps, self.noise_t = (net_t,), options.noise_t
        self.encoder_targets = {"vae": encoder_layers(self.vae)}

    def _start(self, condition: Condition, generator: Source | None) -> Tensor:
        if self.noise_t is None or generator is None:
            return condition.latents
        noise = draw(condition.latents.shape, generator, device=condition.latents.device)
        return self.schedule.add_noise(condition.latents, noise, self.noise_t)

    def import_lora(self, path: str) -> tuple[dict[str, Tensor], int, float] | None:
        """GDPO-SR's released LoRA `.pkl`; where several LoRAs sit on a module, they are one that acts as their sum.

        Raises:
            UserError: it belongs to another base, or adapts the autoencoder too (an OSEDiff file: it is for `weights`).
        """
        release = read_pickle(Path(path))
        if not isinstance(release, dict) or "state_dict_unet" not in release:
            return None
        if "state_dict_vae" in release:
            raise UserError(
                f"'{path}' also changes the autoencoder: it is part of a base, give it as the adapter's weights"
            )
        pairs, full = _split(release, "unet", path)
        if not pairs:
            raise UserError(f"'{path}' holds no LoRA tensors")
        own = self.unet.state_dict()
        for name, tensor in full.items():
            current = own.get(name, own.get(name.replace("conv_in.", "conv_in.base_layer.")))
            alike = current is not None and current.shape == tensor.shape
            # Of a pipeline in outline the first convolution is there, and what is not is compared by its shape.
            if not alike or not (current.is_meta or torch.allclose(current.float().cpu(), tensor, atol=1e-2)):
                raise UserError(f"'{path}' was trained on another base: its frozen {name} differs from this one's")
        found = even({("unet", module): side_by_side(several) for module, several in pairs.items()})
        return dict(found.tensors), found.rank, found.alpha


def _is_run(weights: str) -> bool:
    """Whether it is the folder of a run, or a file of one."""
    path = expand(weights)
    return path.suffix == ".safetensors" or any((path / name).is_file() for name in (LORA, FULL))


def _merge_release(unet: Any, vae: Any, path: Path) -> None:
    """Merge a released `.pkl` into float32 networks: UNet LoRA, conv_in in full, and the autoencoder's LoRA."""
    release = read_pickle(path)
    if not isinstance(release, dict) or "state_dict_unet" not in release:
        raise UserError(f"'{path}' is not an OSEDiff or GDPO-SR checkpoint: it has no 'state_dict_unet'")
    for network, part in ((unet, "unet"), (vae, "vae")):
        if f"state_dict_{part}" not in release:
            continue
        pairs, full = _split(release, part, str(path))
        own = network.state_dict()
        for name, tensor in full.items():
            _require(path, name, own, tensor.shape)
            own[name].copy_(tensor)
        for module, several in pairs.items():
            pair = side_by_side(several)
            _require(path, f"{module}.weight", own, torch.Size((len(pair.b), *pair.a.shape[1:])))
            lora.add(own[f"{module}.weight"], pair)


def _require(path: Path, name: str, own: dict[str, Tensor], shape: torch.Size) -> None:
    if name not in own or own[name].shape != shape:
        found = f"shape {tuple(own[name].shape)}" if name in own else "no such tensor"
        raise UserError(f"'{path}' belongs to another base: {name} is {tuple(shape)} there, here {found}")


def _split(release: dict[Any, Any], part: str, path: str) -> tuple[dict[str, list[Pair]], dict[str, Tensor]]:
    """LoRAs by module, and full tensors, of a network in a release, all float32; nothing is dropped.

    Raises:
        UserError: the release is damaged, or has something that nothing here reads.
    """
    for key in release:
        if str(key).startswith("state_dict_") and key not in _PARTS:
            raise UserError(f"'{path}' changes more than UNet and autoencoder: {shown(key)} is not supported")
    state = release[f"state_dict_{part}"]
    if not isinstance(state, dict):
        raise UserError(f"'{path}' is damaged: expected tensors by name")
    halves: dict[str, dict[str, dict[str, Tensor]]] = {}
    full: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"'{path}' is damaged: {shown(key)} is no tensor")
        match = _LORA_KEY.fullmatch(str(key))
        if not str(key).isprintable() or (match is None and ".base_layer." not in str(key)):
            raise UserError(f"'{path}': unexpected key {shown(key)}")
        try:
            tensor = floats(key, tensor)
        except UserError as error:
            raise UserError(f"'{path}': {error}") from error
        if match is None:
            full[key.replace(".base_layer.", ".")] = tensor
        else:
            halves.setdefault(match["module"], {}).setdefault(match["name"], {})[match["matrix"]] = tensor
    # One for all, or several by name, as the two LoRAs of PiSA-SR have them.
    stated = [rank for key, rank in release.items() if str(key).startswith(f"rank_{part}")]
    pairs = {
        module: [_pair(name, half, module, stated, path) for name, half in found.items()]
        for module, found in halves.items()
    }
    return pairs, full


def _pair(name: str, half: dict[str, Tensor], module: str, stated: list[Any], path: str) -> Pair:
    if set(half) != {"A", "B"}:
        raise UserError(f"'{path}': {module} has only one of lora_A and lora_B of {name}")
    rank = len(half["A"]) if half["A"].ndim > 1 else 0
    if not rank or half["B"].ndim < 2 or half["B"].flatten(1).shape[1] != rank:
        raise UserError(f"'{path}': lora_A and lora_B of {module} have different ranks")
    if rank not in stated:
        raise UserError(f"'{path}' is damaged: {module} has rank {rank}, and the file states {shown(stated)}")
    return Pair(half["A"], half["B"], RELEASED_ALPHA / rank)
