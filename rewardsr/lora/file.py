"""The file of a LoRA: written, found, read and checked against the base that it belongs to."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardsr import run_folder
from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.errors import UserError
from rewardsr.hub import fetch
from rewardsr.lora import layers
from rewardsr.lora.fingerprint import same_base
from rewardsr.lora.layers import NAME
from rewardsr.run_folder import DIFFUSERS_HEADER, OUR_HEADER
from rewardsr.storage import expand
from rewardsr.weights import read_safetensors, write_safetensors

SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


@dataclass(frozen=True)
class Lora:
    """A LoRA apart from any network.

    Attributes:
        tensors: by their names in our file (`unet.<module>.lora_A.weight`): A is (r, in) or a kernel (r, in, kh, kw),
            B is (out, r) or (out, r, 1, 1); float32.
        rank: r, of all modules.
        alpha: B A is scaled by alpha / rank.
        targets: module names (suffixes) by component that it sits on; None: those of the adapter.
    """

    tensors: Mapping[str, Tensor]
    rank: int
    alpha: float
    targets: Mapping[str, Sequence[str]] | None = None


def file_name(name: str = NAME) -> str:
    """Of the LoRA of that name in the folder of a run."""
    return run_folder.LORA if name == NAME else f"{name}.safetensors"


def save(adapter: ISRAdapter, folder: Path | str, name: str = NAME) -> Path:
    """Write the LoRA to its file in `folder` in one atomic step; returns the file.

    Raises:
        UserError: the pipeline does not carry it.
    """
    path = Path(folder) / file_name(name)
    write_safetensors(path, layers.state_dict(adapter, name), header(adapter, name=name))
    return path


def load(
    adapter: ISRAdapter, source: Path | str, scale: float = 1.0, force_base: bool = False, *, name: str = NAME
) -> None:
    """Attach a saved LoRA (or put it into the one of that name that is attached).

    Args:
        adapter: the pipeline that it was trained on.
        source: the file, the folder of a run, or "user/name[@revision]" on the Hub; a pickle only where the pipeline's
            family releases LoRAs as such.
        scale: strength.
        force_base: load although the file says that it was trained on other base weights.
        name: that it has on the pipeline, and of its file where `source` is a folder.

    Raises:
        UserError: no such file, not a LoRA of ours, another base, tensors that do not fit or are not finite.
    """
    path = locate(source, name)
    put(adapter, read(adapter, path, force_base), f"LoRA '{path}'", name)
    layers.set_scale(adapter, scale, name)


def load_several(adapter: ISRAdapter, parts: Sequence[tuple[Path | str, float]], force_base: bool = False) -> None:
    """Attach several LoRAs as one: they act as the sum of their changes, each times its weight.

    Args:
        adapter: the pipeline that they were trained on; it carries none yet.
        parts: file, folder of a run or "user/name[@revision]", and weight, of each.
        force_base: load although a file says that it was trained on other base weights.

    Raises:
        UserError: as `load`; or they sit on different modules.
    """
    paths = [locate(source) for source, _ in parts]
    loras = [read(adapter, path, force_base) for path in paths]
    first = loras[0]
    if any(one.tensors.keys() != first.tensors.keys() for one in loras):
        raise UserError("these LoRAs sit on different modules, and cannot be combined")
    scales = [weight * one.alpha / one.rank for one, (_, weight) in zip(loras, parts, strict=True)]
    tensors = {  # ranks side by side
        key: torch.cat([one.tensors[key] for one in loras])
        if key.endswith(SUFFIXES["A"])
        else torch.cat([one.tensors[key] * scale for one, scale in zip(loras, scales, strict=True)], 1)
        for key in first.tensors
    }
    rank = sum(one.rank for one in loras)
    put(adapter, Lora(tensors, rank, float(rank), first.targets), f"LoRAs {', '.join(map(str, paths))}")


def put(adapter: ISRAdapter, given: Lora, source: str, name: str = NAME) -> None:
    """Attach a LoRA with its tensors, or put them into the one of that name that is attached.

    Raises:
        UserError: it does not fit the pipeline, or is of another rank or alpha than the attached one; `source` is
            named, and the pipeline is as it was.
    """
    fresh = not layers.attached(adapter, name)
    if fresh:
        try:
            layers.attach(adapter, given.rank, given.alpha, name=name, targets=given.targets)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    elif any((config.r, config.lora_alpha) != (given.rank, given.alpha) for config in _configs(adapter, name).values()):
        raise UserError(
            f"{source} has rank {given.rank} and alpha {given.alpha:g}, not those of the LoRA that is attached"
        )
    try:
        layers.load_state_dict(adapter, given.tensors, source, name=name)
    except UserError:
        if fresh:
            layers.detach(adapter, name)
        raise


def locate(source: Path | str, name: str = NAME) -> Path:
    """The file of a LoRA: given as such, as the folder of a run, or as "user/name[@revision]" on the Hub.

    Raises:
        UserError: there is none, or the Hub does not give it.
    """
    path = fetch.fetch_lora(str(source)) if fetch.is_reference(str(source)) else expand(source)
    if path.is_dir():
        path = path / file_name(name)
    if not path.is_file():
        raise UserError(f"no LoRA at '{path}'")
    return path


def read(adapter: ISRAdapter, path: Path, force_base: bool = False) -> Lora:
    """The LoRA in a file for this pipeline.

    Raises:
        UserError: not a LoRA of ours or of the pipeline's family, or trained on another base.
    """
    if path.suffix != ".safetensors":
        imported = adapter.import_lora(str(path))
        if imported is None:
            raise UserError(f"'{path}' is not a safetensors file: pickles can run code and are refused")
        return Lora(*imported)
    tensors, header = read_safetensors(path)
    if OUR_HEADER not in header:
        raise UserError(f"'{path}' does not say which base it belongs to: not written by rewardsr")
    settings, end = settings_of(path, header), ".target_modules"
    targets = {key.removesuffix(end): value for key, value in settings.items() if key.endswith(end)}
    try:
        about = json.loads(header[OUR_HEADER])
        theirs = BaseModel(**about["base"])
        rank, alpha = int(about["rank"]), float(about["alpha"])
        if not all(
            isinstance(value, list) and all(isinstance(one, str) for one in value) for value in targets.values()
        ):
            raise ValueError(f"expected lists of names as {end[1:]}")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' has a damaged header: {error}") from error
    ours = adapter.base_model
    if not force_base and not same_base(ours.fingerprint, theirs.fingerprint):
        raise UserError(
            f"LoRA '{path}' was trained on base '{theirs.id}' ({theirs.revision}), other weights than "
            f"'{ours.id}' ({ours.revision}); --force-base overrides"
        )
    return Lora(tensors, rank, alpha, targets or None)


def settings_of(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """peft's configurations in the header of a file ("unet.lora_alpha", "unet.target_modules", ...), if it has any.

    Raises:
        UserError: they are damaged.
    """
    try:
        settings = json.loads(header.get(DIFFUSERS_HEADER, "{}"))
        if not isinstance(settings, dict):
            raise ValueError("expected settings by name")
    except ValueError as error:
        raise UserError(f"'{path}' has a damaged header: {error}") from error
    return settings


def header(
    adapter: ISRAdapter, only: Iterable[str] | None = None, alpha: float | None = None, name: str = NAME
) -> dict[str, str]:
    """Safetensors metadata: the configuration as diffusers reads it, and what ours needs to refuse another base.

    Args:
        adapter: with the LoRA attached.
        only: the components whose tensors are in the file; all by default.
        alpha: to state, where it is not the one that the LoRA was attached with.
        name: of the LoRA.
    """
    from rewardsr import __version__

    configs = _configs(adapter, name)
    diffusers: dict[str, Any] = {}
    for component in configs if only is None else only:
        config = configs[component].to_dict() | ({} if alpha is None else {"lora_alpha": alpha})
        diffusers |= {
            f"{component}.{key}": sorted(value) if isinstance(value, set) else value for key, value in config.items()
        }
    config = next(iter(configs.values()))
    about = {
        "version": __version__,
        "adapter": adapter.name,
        "licence": adapter.licence,
        "base": asdict(adapter.base_model),
        "rank": config.r,
        "alpha": config.lora_alpha if alpha is None else alpha,
    }
    return {
        DIFFUSERS_HEADER: json.dumps(diffusers, sort_keys=True, default=str),
        OUR_HEADER: json.dumps(about, sort_keys=True),
        "format": "pt",
    }


def _configs(adapter: ISRAdapter, name: str) -> dict[str, Any]:
    """peft's configuration of the LoRA, by component."""
    found = {component: getattr(network, "peft_config", {}) for component, network in adapter.networks.items()}
    return {component: configs[name] for component, configs in found.items() if name in configs}
