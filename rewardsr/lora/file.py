"""The file of a LoRA: written, found, read and checked against the base that it belongs to."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.errors import UserError
from rewardsr.hub import fetch
from rewardsr.lora.fingerprint import same_base
from rewardsr.lora.layers import NAME, _detach, _layers, attach, attached, load_state_dict, set_scale, state_dict
from rewardsr.run_folder import DIFFUSERS_HEADER, LORA, OUR_HEADER
from rewardsr.weights import read_safetensors, write_safetensors


def save(adapter: ISRAdapter, folder: Path | str) -> Path:
    """Write the LoRA to `folder/pytorch_lora_weights.safetensors` in one atomic step; returns the file."""
    path = Path(folder) / LORA
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
    path = fetch.fetch_lora(str(source)) if fetch.is_reference(str(source)) else Path(source).expanduser()
    if path.is_dir():
        path = path / LORA
    if not path.is_file():
        raise UserError(f"no LoRA at '{path}'")
    return path


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
