"""LoRAs in the forms that other programs read, and several LoRAs as one; `rewardsr.lora.foreign` is the way back.

A LoRA here is pairs (A, B) by component and module, of one rank and one scale alpha / rank, as `attach` has it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rewardsr import lora, run_folder
from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError
from rewardsr.storage import write_folder
from rewardsr.weights import read_pickle, read_safetensors, write_networks, write_safetensors

FORMATS = ("diffusers", "peft", "kohya", "osediff", "merged")
PEFT_CONFIG, PEFT_WEIGHTS, PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
KOHYA_PREFIX = "lora_unet_"
RELEASED_ALPHA = 8.0  # OSEDiff's layout states no alpha; peft's default holds there, at every rank
SUFFIX = {"A": ".lora_A.weight", "B": ".lora_B.weight"}

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Lora:
    """A LoRA apart from any network.

    Attributes:
        pairs: by component and module, (r, in) and (out, r), or kernels (r, in, kh, kw) and (out, r, 1, 1); float32.
        rank: r, of all modules.
        alpha: B A is scaled by alpha / rank.
    """

    pairs: Mapping[str, Mapping[str, Pair]]
    rank: int
    alpha: float

    def tensors(self) -> dict[str, Tensor]:
        """By their names in our file."""
        return {
            f"{component}.{module}{SUFFIX[half]}": tensor.contiguous()
            for component, modules in self.pairs.items()
            for module, pair in modules.items()
            for half, tensor in zip("AB", pair, strict=True)
        }


def lora_of(adapter: ISRAdapter) -> Lora:
    """The LoRA that an adapter carries, its strength taken into alpha.

    Raises:
        UserError: it carries none.
    """
    tensors = lora.state_dict(adapter)
    rank, alpha = lora.rank_and_alpha(adapter)
    return lora_from(tensors, adapter, rank, alpha, "LoRA")


def lora_from(tensors: Mapping[str, Tensor], adapter: ISRAdapter, rank: int, alpha: float, what: str) -> Lora:
    """A LoRA of tensors by their names in our file.

    Raises:
        UserError: a tensor has no partner or belongs to no component; `what` is named.
    """
    pairs: dict[str, dict[str, Pair]] = {component: {} for component in adapter.trainable}
    for name, a in tensors.items():
        component, _, rest = name.partition(".")
        if rest.endswith(SUFFIX["A"]):
            module = rest.removesuffix(SUFFIX["A"])
            other = f"{component}.{module}{SUFFIX['B']}"
            if component not in pairs or other not in tensors:
                raise UserError(f"{what}: {name} has no partner, or belongs to no component of the adapter")
            pairs[component][module] = (a, tensors[other])
    return Lora(pairs, rank, alpha)


def combine(parts: Sequence[tuple[Lora, float]]) -> Lora:
    """One LoRA that does what several do together: ranks side by side, each B scaled by its weight.

    Args:
        parts: LoRAs of the same modules, each with its weight.

    Raises:
        UserError: they sit on different modules.
    """
    first = parts[0][0]
    for other, _ in parts[1:]:
        if {c: set(m) for c, m in other.pairs.items()} != {c: set(m) for c, m in first.pairs.items()}:
            raise UserError("these LoRAs sit on different modules, and cannot be combined")
    rank = sum(part.rank for part, _ in parts)

    def joined(component: str, module: str) -> Pair:
        pairs = [(part.pairs[component][module], weight * part.alpha / part.rank) for part, weight in parts]
        return torch.cat([a for (a, _), _ in pairs]), torch.cat([b * scale for (_, b), scale in pairs], 1)

    pairs = {c: {module: joined(c, module) for module in modules} for c, modules in first.pairs.items()}
    return Lora(pairs, rank, float(rank))


def place(adapter: ISRAdapter, given: Lora) -> None:
    """Attach a LoRA to an adapter that carries none.

    Raises:
        UserError: it carries one, or the tensors do not fit.
    """
    lora.attach(adapter, given.rank, given.alpha)
    lora.load_state_dict(adapter, given.tensors())


# ---- export ----


def export(adapter: ISRAdapter, output: Path | str, form: str) -> Path:
    """Write the adapter's LoRA in the form that another program reads, to a new folder.

    Args:
        adapter: with its LoRA; its strength is taken into the files.
        output: the folder; must not exist.
        form: one of `FORMATS`. "diffusers": `pipe.load_lora_weights`, other components than the UNet in a file of their
            own for `load_component`; "peft": a folder a component, for `PeftModel.from_pretrained`; "kohya": one file
            for ComfyUI and its kin; "osediff": a checkpoint in the layout of OSEDiff's repository, combined with the
            released one that the base was made of (`adapter.released`); "merged": whole networks, after which the
            adapter carries no LoRA any more.

    Returns:
        The folder.

    Raises:
        UserError: unknown form, a folder that exists, or a LoRA that the form cannot hold.
    """
    folder = Path(output)
    if form not in FORMATS:
        raise UserError(f"unknown format '{form}': choose one of {', '.join(FORMATS)}")
    if folder.exists():
        raise UserError(f"'{folder}' exists already: choose a new folder")
    given = lora_of(adapter)
    writers: dict[str, Callable[[Path], None]] = {
        "diffusers": lambda path: _write_diffusers(adapter, given, path),
        "peft": lambda path: _write_peft(given, path),
        "kohya": lambda path: _write_kohya(given, path),
        "osediff": lambda path: _write_osediff(given, adapter.released, path),
        "merged": lambda path: write_networks(adapter.networks, path),
    }
    if form == "merged":
        lora.merge(adapter)
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_folder(folder, writers[form])
    return folder


def load_component(network: nn.Module, path: Path | str) -> None:
    """Put the LoRA of one component, as `export` writes it for diffusers, onto that component of a plain pipeline.

    For components that diffusers' `load_lora_weights` passes over: a ControlNet, an autoencoder.

    Args:
        network: `pipe.controlnet`, say.
        path: `controlnet_lora.safetensors`.

    Raises:
        UserError: the file is damaged, holds another component, or does not fit.
    """
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    tensors, header = read_safetensors(Path(path))
    components = {name.split(".")[0] for name in tensors}
    if lora.DIFFUSERS_HEADER not in header or len(components) != 1:
        raise UserError(f"'{path}' is no file of one component, as `rewardsr export --format diffusers` writes it")
    prefix = f"{components.pop()}."
    try:
        settings = json.loads(header[lora.DIFFUSERS_HEADER])
        rank, alpha, targets = (settings[f"{prefix}{key}"] for key in ("r", "lora_alpha", "target_modules"))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' has a damaged header: {error}") from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
    try:
        inject_adapter_in_model(config, network, adapter_name=lora.NAME)
    except ValueError as error:
        raise UserError(f"'{path}' does not fit {type(network).__name__}: {error}") from error
    own = {name.removeprefix(prefix): value for name, value in tensors.items()}
    result = set_peft_model_state_dict(network, own, adapter_name=lora.NAME)
    left = [key for key in result.missing_keys if "lora_" in key]
    if result.unexpected_keys or left:
        raise UserError(f"'{path}' does not fit {type(network).__name__}: {(result.unexpected_keys or left)[0]}")


def _write_diffusers(adapter: ISRAdapter, given: Lora, folder: Path) -> None:
    for component, modules in given.pairs.items():
        name = run_folder.LORA if component == "unet" else f"{component}_lora.safetensors"
        alone = Lora({component: modules}, given.rank, given.alpha)
        write_safetensors(folder / name, alone.tensors(), lora.header(adapter, [component], given.alpha))


def _write_peft(given: Lora, folder: Path) -> None:
    from peft import LoraConfig

    for component, modules in given.pairs.items():
        config = LoraConfig(r=given.rank, lora_alpha=given.alpha, target_modules=sorted(modules))
        config.save_pretrained(str(folder / component))
        alone = Lora({component: modules}, given.rank, given.alpha)
        tensors = {f"{PEFT_PREFIX}{n.removeprefix(component + '.')}": value for n, value in alone.tensors().items()}
        write_safetensors(folder / component / PEFT_WEIGHTS, tensors, {"format": "pt"})


def _write_kohya(given: Lora, folder: Path) -> None:
    if set(given.pairs) != {"unet"} or any("image_attentions" in module for module in given.pairs["unet"]):
        raise UserError(
            f"kohya's form holds a LoRA on Stable Diffusion's UNet; this one sits on {', '.join(given.pairs)} of "
            "another pipeline: export for diffusers or peft"
        )
    tensors = {}
    for module, (a, b) in given.pairs["unet"].items():
        name = KOHYA_PREFIX + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a.contiguous(), b.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(given.alpha))
    about = {"ss_network_module": "networks.lora", "ss_network_dim": str(given.rank)}
    write_safetensors(folder / "lora.safetensors", tensors, about | {"ss_network_alpha": f"{given.alpha:g}"})


def _write_osediff(given: Lora, released: str | None, folder: Path) -> None:
    """OSEDiff's layout: its own LoRA and ours side by side, rescaled, since that layout's scale is 8 / rank."""
    if released is None or not Path(released).expanduser().is_file():
        raise UserError(
            "export --format osediff combines the LoRA with the released checkpoint that the base was made of: load "
            "the adapter with weights=FILE.pkl"
        )
    content = read_pickle(Path(released).expanduser())
    state = content.get("state_dict_unet") if isinstance(content, dict) else None
    theirs = content.get("rank_unet") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not isinstance(theirs, int):
        raise UserError(f"'{released}' is no checkpoint of OSEDiff: it has no state_dict_unet, or no rank_unet")
    if set(given.pairs) != {"unet"}:
        raise UserError(f"osediff's form holds a LoRA on the UNet; this one sits on {', '.join(given.pairs)}")
    left, rank = dict(given.pairs["unet"]), theirs + given.rank
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        module, _, rest = key.partition(".lora_A.")
        if not rest:
            made.setdefault(key, value)
            continue
        b_key = key.replace(".lora_A.", ".lora_B.")
        if module not in left:
            raise UserError(f"'{released}' has a LoRA on {module}, and this one has none there")
        a, b = left.pop(module)
        if a.shape[1:] != value.shape[1:] or len(b) != len(state[b_key]):
            raise UserError(f"'{released}': {module} belongs to a module of another size")
        made[key] = torch.cat([value.float(), a])
        # Each half keeps its own scale under the common one of 8 / rank.
        halves = state[b_key].float() * rank / theirs, b * (given.alpha / given.rank) * rank / RELEASED_ALPHA
        made[b_key] = torch.cat(halves, 1)
    if left:
        raise UserError(f"'{released}' has no LoRA on {next(iter(left))}, and its layout has no place for one")
    torch.save({**content, "rank_unet": rank, "state_dict_unet": made}, folder / "osediff.pkl")
