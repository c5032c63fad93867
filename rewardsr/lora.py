"""Our LoRA: attach, switch off, save, load, merge.

One peft adapter named `rewardsr` sits on the modules in `ISRAdapter.lora_targets`; its tensors are float32 even on a
bf16 base. Files are `pytorch_lora_weights.safetensors` with peft's own key names under the component's name
(`unet.<module>.lora_A.weight`) and the LoRA's configuration in the header, which plain diffusers reads.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardsr import hub
from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.errors import UserError
from rewardsr.files import read_safetensors, write_safetensors
from rewardsr.fingerprint import same_base

NAME = "rewardsr"
FILE_NAME = "pytorch_lora_weights.safetensors"
DIFFUSERS_HEADER = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
OUR_HEADER = "rewardsr"


def attach(adapter: ISRAdapter, rank: int = 4, alpha: float = 8, seed: int = 0) -> None:
    """Put a fresh LoRA on every target module; outputs stay bit-equal until it is trained (B is zero).

    Args:
        adapter: the pipeline; its base weights are frozen.
        rank: r of the LoRA.
        alpha: the LoRA is scaled by alpha / rank; 8 at rank 4 is what OSEDiff and GDPO-SR release.
        seed: of the initial A matrices.

    Raises:
        UserError: a LoRA is there already, or a target module does not exist.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if attached(adapter):
        raise UserError("this pipeline carries a rewardsr LoRA already")
    for component, network in adapter.trainable.items():
        targets = list(adapter.lora_targets[component])
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian")
        # A is drawn by peft from torch's global generator: seed it here and give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                inject_adapter_in_model(config, network, adapter_name=NAME)
            except ValueError as error:
                raise UserError(f"LoRA targets of '{component}' fit no module: {error}") from error
    for layer in _layers(adapter):
        # Under autocast the LoRA computes in the base's precision; peft's own cast to float32 would only cost memory.
        layer.cast_input_dtype_enabled = False
    for parameter in parameters(adapter).values():  # peft gives them the base's precision
        parameter.data = parameter.data.float()


def attached(adapter: ISRAdapter) -> bool:
    """Whether the pipeline carries our LoRA."""
    return next(iter(_layers(adapter)), None) is not None


def parameters(adapter: ISRAdapter) -> dict[str, nn.Parameter]:
    """The trainable tensors, by their names in the file, in a fixed order."""
    found: dict[str, nn.Parameter] = {}
    for component, network in adapter.trainable.items():
        for name, parameter in network.named_parameters():
            if f".{NAME}." in name:
                found[f"{component}.{name.replace(f'.{NAME}.', '.')}"] = parameter
    return dict(sorted(found.items()))


@contextmanager
def keep_float32(adapter: ISRAdapter) -> Iterator[None]:
    """Inside, the networks may be moved to another device and precision: the LoRA goes along unrounded, in float32."""
    exact = {name: parameter.detach().clone() for name, parameter in parameters(adapter).items()}
    yield
    for name, parameter in parameters(adapter).items():
        parameter.data = torch.empty_like(parameter, dtype=torch.float32).copy_(exact[name])


@contextmanager
def reference(adapter: ISRAdapter) -> Iterator[None]:
    """Inside, the pipeline is what it was before fine-tuning: our LoRA is off, and no second network is needed.

    Never back-propagate inside: the LoRA's gradients would be zero, silently.
    """
    switched = [layer for layer in _layers(adapter) if not layer.disable_adapters]  # none inside another `reference`
    for layer in switched:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in switched:
            layer.enable_adapters(True)


def set_scale(adapter: ISRAdapter, scale: float) -> None:
    """Strength of the LoRA: 0 is the base bit for bit, 1 as trained."""
    for layer in _layers(adapter):
        layer.set_scale(NAME, scale)


def state_dict(adapter: ISRAdapter) -> dict[str, Tensor]:
    """The LoRA's tensors on the CPU, float32, by their names in the file.

    Raises:
        UserError: there is no LoRA.
    """
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in parameters(adapter).items()}
    if not tensors:
        raise UserError("this pipeline carries no rewardsr LoRA: attach or load one first")
    return tensors


def load_state_dict(adapter: ISRAdapter, tensors: dict[str, Tensor], source: str = "LoRA") -> None:
    """Put tensors into the attached LoRA.

    Raises:
        UserError: missing, unexpected or misshapen tensors, or values that are not finite.
    """
    own = parameters(adapter)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        parts = [
            f"{len(keys)} {kind} (first: {keys[0]})"
            for kind, keys in (("missing", missing), ("unexpected", extra))
            if keys
        ]
        raise UserError(f"{source} does not fit this pipeline: {', '.join(parts)}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise UserError(f"{source}: {name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}")
        if not tensors[name].isfinite().all():
            raise UserError(f"{source}: {name} holds values that are not finite")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def save(adapter: ISRAdapter, folder: Path | str) -> Path:
    """Write the LoRA to `folder/pytorch_lora_weights.safetensors` in one atomic step; returns the file."""
    path = Path(folder) / FILE_NAME
    write_safetensors(path, state_dict(adapter), header(adapter))
    return path


def load(adapter: ISRAdapter, source: Path | str, scale: float = 1.0, force_base: bool = False) -> None:
    """Attach a saved LoRA (or put it into the one that is attached).

    Args:
        adapter: the pipeline that it was trained on.
        source: the file, the folder of a run, or "user/name[@revision]" on the Hub; a pickle only where the pipeline's
            family releases LoRAs as such.
        scale: strength.
        force_base: load although the file says that it was trained on other base weights.

    Raises:
        UserError: no such file, not a LoRA of ours, another base, tensors that do not fit or are not finite.
    """
    path = locate(source)
    tensors, rank, alpha = read(adapter, path, force_base)
    fresh = not attached(adapter)
    if fresh:
        attach(adapter, rank, alpha)
    elif any((layer.r[NAME], layer.lora_alpha[NAME]) != (rank, alpha) for layer in _layers(adapter)):
        raise UserError(f"LoRA '{path}' has rank {rank} and alpha {alpha:g}, not those of the LoRA that is attached")
    try:
        load_state_dict(adapter, tensors, f"LoRA '{path}'")
    except UserError:
        if fresh:
            _detach(adapter)
        raise
    set_scale(adapter, scale)


def locate(source: Path | str) -> Path:
    """The file of a LoRA: given as such, as the folder of a run, or as "user/name[@revision]" on the Hub.

    Raises:
        UserError: there is none, or the Hub does not give it.
    """
    path = hub.fetch_lora(str(source)) if hub.is_reference(str(source)) else Path(source).expanduser()
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise UserError(f"no LoRA at '{path}'")
    return path


def merge(adapter: ISRAdapter) -> None:
    """Add the LoRA into the base weights and drop it.

    Raises:
        UserError: there is no LoRA, or the base is not in float32 (merging in bf16 loses about a tenth of a LoRA).
    """
    if not attached(adapter):
        raise UserError("nothing to merge: this pipeline carries no rewardsr LoRA")
    if adapter.dtype != torch.float32:
        raise UserError("merge in float32: load the adapter with dtype=torch.float32, and cast afterwards")
    for layer in _layers(adapter):
        layer.merge(adapter_names=[NAME])
    _detach(adapter)


def _detach(adapter: ISRAdapter) -> None:
    """Give the networks their plain modules back."""
    for network in adapter.trainable.values():
        for name, layer in [(name, layer) for name, layer in network.named_modules() if _is_lora(layer)]:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, layer.get_base_layer())
        network.requires_grad_(False)
        if hasattr(network, "peft_config"):
            del network.peft_config


def delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A in full: (out, in) of (r, in) and (out, r), or a kernel of (r, in, kh, kw) and (out, r, 1, 1)."""
    return scale * torch.einsum("or,r...->o...", b.flatten(1), a)


def read(adapter: ISRAdapter, path: Path, force_base: bool = False) -> tuple[dict[str, Tensor], int, float]:
    """Tensors by name, rank and alpha of a LoRA file for this pipeline.

    Raises:
        UserError: not a LoRA of ours or of the pipeline's family, or trained on another base.
    """
    if path.suffix != ".safetensors":
        imported = adapter.import_lora(str(path))
        if imported is None:
            raise UserError(f"'{path}' is not a safetensors file: pickles can run code and are refused")
        return imported
    tensors, header = read_safetensors(path)
    if OUR_HEADER not in header:
        raise UserError(f"'{path}' does not say which base it belongs to: not written by rewardsr")
    try:
        about = json.loads(header[OUR_HEADER])
        theirs = BaseModel(**about["base"])
        rank, alpha = int(about["rank"]), float(about["alpha"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' has a damaged header: {error}") from error
    ours = adapter.base_model
    if not force_base and not same_base(ours.fingerprint, theirs.fingerprint):
        raise UserError(
            f"LoRA '{path}' was trained on base '{theirs.id}' ({theirs.revision}), other weights than "
            f"'{ours.id}' ({ours.revision}); --force-base overrides"
        )
    return tensors, rank, alpha


def rank_and_alpha(adapter: ISRAdapter) -> tuple[int, float]:
    """Rank of the attached LoRA, and the alpha by which it acts: its strength is taken in.

    Raises:
        UserError: there is no LoRA.
    """
    layer = next(iter(_layers(adapter)), None)
    if layer is None:
        raise UserError("this pipeline carries no rewardsr LoRA: attach or load one first")
    return layer.r[NAME], layer.scaling[NAME] * layer.r[NAME]


def target_shapes(adapter: ISRAdapter, component: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """What `attach` would put a LoRA on: by module, its output channels and the shape of one output's weights."""
    targets = tuple(adapter.lora_targets[component])
    suffixes = tuple(f".{target}" for target in targets)
    return {
        name: (int(module.weight.shape[0]), tuple(module.weight.shape[1:]))
        for name, module in adapter.trainable[component].named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and (name in targets or name.endswith(suffixes))
    }


def header(adapter: ISRAdapter, components: Iterable[str] | None = None, alpha: float | None = None) -> dict[str, str]:
    """Safetensors metadata: the configuration as diffusers reads it, and what ours needs to refuse another base.

    Args:
        adapter: with our LoRA attached.
        components: those whose tensors are in the file; all by default.
        alpha: to state, where it is not the one that the LoRA was attached with.
    """
    from rewardsr import __version__

    diffusers: dict[str, Any] = {}
    for component in adapter.trainable if components is None else components:
        configs: Any = adapter.trainable[component].peft_config
        config = configs[NAME].to_dict() | ({} if alpha is None else {"lora_alpha": alpha})
        diffusers |= {
            f"{component}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()
        }
    layer = next(iter(_layers(adapter)))
    about = {
        "version": __version__,
        "adapter": adapter.name,
        "licence": adapter.licence,
        "base": asdict(adapter.base_model),
        "rank": layer.r[NAME],
        "alpha": layer.lora_alpha[NAME] if alpha is None else alpha,
    }
    return {
        DIFFUSERS_HEADER: json.dumps(diffusers, sort_keys=True, default=str),
        OUR_HEADER: json.dumps(about, sort_keys=True),
        "format": "pt",
    }


def _layers(adapter: ISRAdapter) -> Iterator[Any]:
    """The peft layers that carry our LoRA."""
    for network in adapter.trainable.values():
        yield from (module for module in network.modules() if _is_lora(module))


def _is_lora(module: nn.Module) -> bool:
    return NAME in getattr(module, "lora_A", {})
