"""LoRAs that other programs made, for an adapter of ours.

Foreign files may have another rank and scale in every module, and nothing for some; they are brought to one rank and
scale, with zeros where there is nothing, without changing what B A does.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardsr import lora
from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError
from rewardsr.lora.exchange import KOHYA_PREFIX, PEFT_CONFIG, PEFT_PREFIX, PEFT_WEIGHTS, SUFFIX, Lora, Pair, lora_from
from rewardsr.weights import read_safetensors


def read_foreign(adapter: ISRAdapter, source: Path | str) -> Lora:
    """A LoRA in the form of another program, for this adapter.

    Args:
        adapter: whose modules the file's names are matched with.
        source: a file of kohya's, diffusers' or peft's names, a peft folder (or a folder of such, by component), or a
            checkpoint of the adapter's family.

    Returns:
        The LoRA, on all modules that the adapter adapts: zero where the file has nothing.

    Raises:
        UserError: nothing that can be read, or modules that the adapter does not adapt.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _complete(adapter, _read_peft(adapter, path), path)
    if path.suffix != ".safetensors":
        imported = adapter.import_lora(str(path))
        if imported is None:
            raise UserError(f"'{path}' is neither safetensors nor a checkpoint of adapter '{adapter.name}'")
        tensors, rank, alpha = imported
        return lora_from(tensors, adapter, rank, alpha, f"'{path}'")
    tensors, header = read_safetensors(path)
    if any(name.startswith(KOHYA_PREFIX) for name in tensors):
        return _complete(adapter, _read_kohya(adapter, tensors, path), path)
    return _complete(adapter, _read_named(adapter, tensors, header, path), path)


Entry = tuple[Tensor, Tensor, float]  # A, B, and the scale alpha / rank of this module


def _complete(adapter: ISRAdapter, found: dict[str, dict[str, Entry]], path: Path) -> Lora:
    """Bring all modules to one rank and scale, with zeros where there is nothing."""
    shapes = {component: lora.target_shapes(adapter, component) for component in adapter.trainable}
    entries = [entry for modules in found.values() for entry in modules.values()]
    if not entries:
        raise UserError(f"'{path}' holds no LoRA tensors")
    for component, modules in found.items():
        foreign = sorted(modules.keys() - shapes[component].keys())
        if foreign:
            raise UserError(
                f"'{path}' adapts {len(foreign)} modules that adapter '{adapter.name}' does not (first: {foreign[0]})"
            )
    rank = max(a.shape[0] for a, _, _ in entries)
    same = len({(a.shape[0], scale) for a, _, scale in entries}) == 1
    scale = entries[0][2] if same else 1.0
    pairs: dict[str, dict[str, Pair]] = {component: {} for component in shapes}
    for component, targets in shapes.items():
        for module, (out, kernel) in targets.items():
            a, b = torch.zeros(rank, *kernel), torch.zeros(out, rank, *[1] * (len(kernel) - 1))
            if module in found.get(component, {}):
                own_a, own_b, own_scale = found[component][module]
                if own_a.shape[1:] != a.shape[1:] or own_b.shape[0] != out:
                    raise UserError(f"'{path}': {component}.{module} belongs to a module of another size")
                a[: len(own_a)], b[:, : len(own_a)] = own_a, own_b.reshape(out, -1, *b.shape[2:]) * (own_scale / scale)
            pairs[component][module] = (a, b)
    return Lora(pairs, rank, scale * rank)


def _entry(a: Tensor, b: Tensor, alpha: float, key: str, path: Path) -> Entry:
    if not len(a) or not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"'{path}': {key} has rank {len(a)} and alpha {alpha:g}, expected positive numbers")
    return a, b, alpha / len(a)


def _read_kohya(adapter: ISRAdapter, tensors: dict[str, Tensor], path: Path) -> dict[str, dict[str, Entry]]:
    if "unet" not in adapter.trainable:
        raise UserError(f"'{path}' is a LoRA on a UNet, and adapter '{adapter.name}' trains none")
    by_flat = {name.replace(".", "_"): name for name, _ in adapter.trainable["unet"].named_modules()}
    found: dict[str, Entry] = {}
    for key in sorted(tensors):
        flat, _, rest = key.removeprefix(KOHYA_PREFIX).partition(".")
        if not key.startswith(KOHYA_PREFIX) or flat not in by_flat:
            raise UserError(f"'{path}': {key} belongs to no module of this UNet")
        if rest != "lora_down.weight":
            continue
        stem = key.removesuffix("lora_down.weight")
        if f"{stem}lora_up.weight" not in tensors:
            raise UserError(f"'{path}': {stem}lora_up.weight is missing")
        a, b = tensors[key].float(), tensors[f"{stem}lora_up.weight"].float()
        alpha = float(tensors.get(f"{stem}alpha", torch.tensor(float(len(a)))))  # none means alpha = rank there
        found[by_flat[flat]] = _entry(a, b, alpha, key, path)
    return {"unet": found}


def _read_named(
    adapter: ISRAdapter, tensors: dict[str, Tensor], header: Mapping[str, str], path: Path
) -> dict[str, dict[str, Entry]]:
    """peft's names under the component's, as diffusers writes them; alpha from the header, else equal to the rank."""
    try:
        settings: dict[str, Any] = json.loads(header.get(lora.DIFFUSERS_HEADER, "{}"))
    except ValueError as error:
        raise UserError(f"'{path}' has a damaged header: {error}") from error
    found: dict[str, dict[str, Entry]] = {}
    for key, a in tensors.items():
        component, _, rest = key.partition(".")
        if component not in adapter.trainable:
            raise UserError(f"'{path}': {key} belongs to no component of adapter '{adapter.name}'")
        if not rest.endswith(SUFFIX["A"]):
            if not rest.endswith(SUFFIX["B"]):
                raise UserError(f"'{path}': unexpected key {key}")
            continue
        other = key.removesuffix(SUFFIX["A"]) + SUFFIX["B"]
        if other not in tensors:
            raise UserError(f"'{path}': {other} is missing")
        alpha = float(settings.get(f"{component}.lora_alpha", len(a)))
        module = rest.removesuffix(SUFFIX["A"])
        found.setdefault(component, {})[module] = _entry(a.float(), tensors[other].float(), alpha, key, path)
    return found


def _read_peft(adapter: ISRAdapter, folder: Path) -> dict[str, dict[str, Entry]]:
    """One peft folder (of the only component that trains), or one a component."""
    inside = {name: folder / name for name in adapter.trainable if (folder / name / PEFT_CONFIG).is_file()}
    if (folder / PEFT_CONFIG).is_file() and len(adapter.trainable) == 1:
        inside = {next(iter(adapter.trainable)): folder}
    if not inside:
        raise UserError(f"'{folder}' holds no {PEFT_CONFIG}, nor folders {', '.join(adapter.trainable)} with one")
    found: dict[str, dict[str, Entry]] = {}
    for component, path in inside.items():
        try:
            alpha = float(json.loads((path / PEFT_CONFIG).read_text())["lora_alpha"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{path / PEFT_CONFIG}' is damaged: {error}") from error
        own = {
            f"{component}.{name.removeprefix(PEFT_PREFIX)}": value
            for name, value in read_safetensors(path / PEFT_WEIGHTS)[0].items()
        }
        about = {lora.DIFFUSERS_HEADER: json.dumps({f"{component}.lora_alpha": alpha})}
        found |= _read_named(adapter, own, about, path)
    return found
