"""Formats of LoRAs in other programs, each with what writes and what reads it: `FORMATS` is the one table of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rewardsr import run_folder
from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError
from rewardsr.json_object import read_object
from rewardsr.lora.file import header, settings_of
from rewardsr.lora.foreign import denoiser_of, read_tensors
from rewardsr.lora.pairs import SUFFIXES, Lora
from rewardsr.storage import expand
from rewardsr.weights import read_pickle, read_safetensors, write_networks, write_safetensors

PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
KOHYA_PREFIX = "lora_unet_"
KOHYA_SUFFIXES = {"A": ".lora_down.weight", "B": ".lora_up.weight", "alpha": ".alpha"}
RELEASED_ALPHA = 8.0  # OSEDiff's layout states no alpha; peft's default holds there, at every rank


@dataclass(frozen=True)
class Format:
    """How another program keeps LoRAs.

    Attributes:
        about: what reads such files.
        write: writes a LoRA of an adapter, which may be loaded in outline, into an empty folder; "merged": the networks
            of the adapter, which hold it already.
        read: reads a file or folder for an adapter; None where that is of another format. Without it: export only.
    """

    about: str
    write: Callable[[ISRAdapter, Lora, Path], None]
    read: Callable[[ISRAdapter, Path], Lora | None] | None = None


# ---- diffusers and peft: peft's names ----


def _by_component(given: Lora) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in given.tensors.items():
        component, _, rest = key.partition(".")
        found.setdefault(component, {})[rest] = tensor
    return found


def _write_diffusers(adapter: ISRAdapter, given: Lora, folder: Path) -> None:
    for component, tensors in _by_component(given).items():
        file = run_folder.LORA if component == "unet" else f"{component}_lora.safetensors"
        named = {f"{component}.{key}": tensor for key, tensor in tensors.items()}
        write_safetensors(folder / file, named, header(adapter, given, [component]))


def _read_file(adapter: ISRAdapter, path: Path) -> Lora | None:
    """A file of any program's names, with peft's settings in its header as diffusers writes them."""
    if path.suffix != ".safetensors":
        return None
    if path.name == PEFT_WEIGHTS and path.with_name(PEFT_CONFIG).is_file():  # which has its alpha
        return _read_peft(adapter, path.parent)
    tensors, about = read_safetensors(path)
    return read_tensors(adapter, f"'{path}'", tensors, settings_of(path, about, denoiser_of(adapter)))


def _write_peft(adapter: ISRAdapter, given: Lora, folder: Path) -> None:
    from peft import LoraConfig

    for component, tensors in _by_component(given).items():
        modules = sorted({key.removesuffix(SUFFIXES["A"]) for key in tensors if key.endswith(SUFFIXES["A"])})
        config = LoraConfig(r=given.rank, lora_alpha=given.alpha, target_modules=modules)
        config.save_pretrained(str(folder / component))
        named = {f"{PEFT_PREFIX}{key}": tensor for key, tensor in tensors.items()}
        write_safetensors(folder / component / PEFT_WEIGHTS, named, {"format": "pt"})


def _read_peft(adapter: ISRAdapter, folder: Path) -> Lora | None:
    """One peft folder (of the only component that is adapted), or one a component."""
    if not folder.is_dir():
        return None
    known = list(adapter.lora_targets)
    inside = {component: folder / component for component in known if (folder / component / PEFT_CONFIG).is_file()}
    if (folder / PEFT_CONFIG).is_file() and len(known) == 1:
        inside = {known[0]: folder}
    if not inside:
        raise UserError(f"'{folder}' holds no {PEFT_CONFIG}, nor folders {', '.join(known)} with one")
    for path in sorted(folder.glob(f"*/{PEFT_CONFIG}")):
        if path.parent not in inside.values():
            raise UserError(f"'{path.parent}' is of no network that adapter '{adapter.name}' adapts: take it out")
    tensors, settings = {}, {}
    for component, path in inside.items():
        settings[component] = read_object(path / PEFT_CONFIG)
        if settings[component].get("lora_alpha") is None:
            raise UserError(f"'{path / PEFT_CONFIG}' is damaged: it states no lora_alpha")
        for key, tensor in read_safetensors(path / PEFT_WEIGHTS)[0].items():
            tensors[f"{component}.{key.removeprefix(PEFT_PREFIX)}"] = tensor
    return read_tensors(adapter, f"'{folder}'", tensors, settings)


# ---- kohya's sd-scripts, and with them ComfyUI ----


def _write_kohya(adapter: ISRAdapter, given: Lora, folder: Path) -> None:
    found = _by_component(given)
    if set(found) != {"unet"} or any("image_attentions" in key for key in found["unet"]):
        raise UserError(
            f"kohya's form holds a LoRA on Stable Diffusion's UNet; this one sits on {', '.join(found)} of "
            "another pipeline: export for diffusers or peft"
        )
    tensors = {}
    for key, tensor in found["unet"].items():
        part = "A" if key.endswith(SUFFIXES["A"]) else "B"
        flat = KOHYA_PREFIX + key.removesuffix(SUFFIXES[part]).replace(".", "_")
        tensors[f"{flat}{KOHYA_SUFFIXES[part]}"] = tensor
        tensors[f"{flat}{KOHYA_SUFFIXES['alpha']}"] = torch.tensor(float(given.alpha))
    about = {"ss_network_module": "networks.lora", "ss_network_dim": str(given.rank)}
    write_safetensors(folder / "lora.safetensors", tensors, about | {"ss_network_alpha": f"{given.alpha:g}"})


# ---- a pipeline family's own checkpoints ----


def _write_osediff(adapter: ISRAdapter, given: Lora, folder: Path) -> None:
    """OSEDiff's layout: its own LoRA and ours side by side, rescaled, since that layout's scale is 8 / rank."""
    released = None if adapter.released is None else expand(adapter.released)
    if released is None or not released.is_file():
        raise UserError(
            "export --format osediff combines the LoRA with the released checkpoint that the base was made of: load "
            "the adapter with weights=FILE.pkl"
        )
    content = read_pickle(released)
    state = content.get("state_dict_unet") if isinstance(content, dict) else None
    theirs = content.get("rank_unet") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(theirs, int):
        raise UserError(f"'{released}' is no checkpoint of OSEDiff: it has no state_dict_unet, or no rank_unet")
    found = _by_component(given)
    if set(found) != {"unet"}:
        raise UserError(f"osediff's form holds a LoRA on the UNet; this one sits on {', '.join(found)}")
    left, rank = dict(found["unet"]), theirs + given.rank
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, rest = key.partition(".lora_A.")
        if not rest:
            made.setdefault(key, value)
            continue
        b_key = key.replace(".lora_A.", ".lora_B.")
        if f"{module}{SUFFIXES['A']}" in left:
            a, b = (left.pop(f"{module}{suffix}") for suffix in SUFFIXES.values())
        else:  # that layout has one rank for all modules
            a, b = (
                value.new_zeros(given.rank, *value.shape[1:]),
                state[b_key].new_zeros(len(state[b_key]), given.rank, *state[b_key].shape[2:]),
            )
        if a.shape[1:] != value.shape[1:] or len(b) != len(state[b_key]):
            raise UserError(f"'{released}': {module} belongs to a module of another size")
        made[key] = torch.cat([value.float(), a])
        # Each half keeps its own scale under the common one of 8 / rank.
        halves = state[b_key].float() * rank / theirs, b * (given.alpha / given.rank) * rank / RELEASED_ALPHA
        made[b_key] = torch.cat(halves, 1)
    if left:
        module = next(iter(left)).removesuffix(SUFFIXES["A"])
        raise UserError(f"'{released}' has no LoRA on {module}, and its layout has no place for one")
    torch.save({**content, "rank_unet": rank, "state_dict_unet": made}, folder / "osediff.pkl")


def _read_family(adapter: ISRAdapter, path: Path) -> Lora | None:
    if path.is_dir() or path.suffix == ".safetensors":
        return None
    imported = adapter.import_lora(str(path))
    return None if imported is None else Lora(*imported)


def _write_merged(adapter: ISRAdapter, given: Lora, folder: Path) -> None:
    write_networks(adapter.networks, folder)


FORMATS = {
    "diffusers": Format(
        "diffusers' `load_lora_weights`; components but the UNet in a file each, for rewardsr's `load_component`",
        _write_diffusers,
        _read_file,
    ),
    "peft": Format("`PeftModel.from_pretrained`, a folder a component", _write_peft, _read_peft),
    "kohya": Format("ComfyUI and its kin, one file for the UNet", _write_kohya, _read_file),
    "osediff": Format(
        "OSEDiff's repository, a checkpoint together with the released one that the base was made of",
        _write_osediff,
        _read_family,
    ),
    "merged": Format("any program, whole networks in diffusers' layout", _write_merged),
}
