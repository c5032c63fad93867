"""The file of a LoRA: written, found, read and checked against the base that it belongs to.

What else a method trains, weights of the base in full, lies in a file beside it (`rewardsr.lora.full`) and goes along.
"""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardsr import run_folder
from rewardsr.adapter import BaseModel, ISRAdapter
from rewardsr.errors import UserError, shown
from rewardsr.hub import fetch
from rewardsr.json_object import parse_object
from rewardsr.lora import full, layers
from rewardsr.lora.fingerprint import differing, is_early, matches_early, same_base
from rewardsr.lora.foreign import VARIATIONS, check_settings
from rewardsr.lora.layers import NAME
from rewardsr.lora.pairs import Lora, Pair, Place, alpha_of, by_component, even, rank_of, side_by_side
from rewardsr.lora.targets import target_shapes, tensor_shapes
from rewardsr.options import Options, marked_for_lora
from rewardsr.run_folder import DIFFUSERS_HEADER, OUR_HEADER
from rewardsr.storage import expand
from rewardsr.weights import read_safetensors, write_safetensors

log = logging.getLogger(__name__)


def file_name(name: str = NAME) -> str:
    """Of the LoRA of that name in the folder of a run."""
    return run_folder.LORA if name == NAME else f"{name}.safetensors"


def save(adapter: ISRAdapter, folder: Path | str, name: str = NAME) -> Path:
    """Write the LoRA, its strength taken in, to its file in `folder` in one atomic step; returns the file.

    Weights that were trained in full go into another; it is returned where there is no LoRA.

    Raises:
        UserError: the pipeline carries neither.
    """
    path, beside = Path(folder) / file_name(name), Path(folder) / run_folder.FULL
    if full.names(adapter):
        full.save(adapter, beside, _about(adapter))
        if not layers.attached(adapter, name):
            return beside
    return write(adapter, held(adapter, name), path)


def write(adapter: ISRAdapter, given: Lora, path: Path) -> Path:
    """Write a LoRA that the pipeline need not carry to our file, in one atomic step; returns the file."""
    write_safetensors(path, dict(given.tensors), header(adapter, given))
    return path


def held(adapter: ISRAdapter, name: str = NAME) -> Lora:
    """The LoRA as it acts in the pipeline, at whatever strength: tensors on the CPU, rank, alpha and places.

    Raises:
        UserError: the pipeline does not carry it.
    """
    rank, alpha = layers.rank_and_alpha(adapter, name)
    pairs, scales = Lora(layers.state_dict(adapter, name), rank, alpha).pairs(), layers.scales(adapter, name)
    given = even({place: pair._replace(scale=scales[place]) for place, pair in pairs.items()})
    found = {component: getattr(network, "peft_config", {}) for component, network in adapter.networks.items()}
    targets = {component: sorted(of[name].target_modules) for component, of in found.items() if name in of}
    return replace(given, targets=targets, in_full=bool(full.names(adapter)))


def load(
    adapter: ISRAdapter, source: Path | str, scale: float = 1.0, force_base: bool = False, *, name: str = NAME
) -> None:
    """Attach a saved LoRA (or put it into the one of that name that is attached).

    What was trained in full beside it is loaded, too; a run may have left that alone.

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
    _check_strength(scale)
    path = locate(source, name)
    beside = path.with_name(run_folder.FULL)
    if path == beside:
        _load_full(adapter, beside, scale, force_base)
        return
    given = read(adapter, path, force_base)
    if given.in_full:
        _load_full(adapter, beside, scale, force_base)
    put(adapter, given, f"LoRA '{path}'", name)
    layers.set_scale(adapter, scale, name)
    _compare_options(adapter, {path: given})


def _load_full(adapter: ISRAdapter, path: Path, scale: float, force_base: bool) -> None:
    def check(theirs: BaseModel) -> None:
        if not force_base:
            _check_base(adapter, path, theirs)

    full.load(adapter, path, scale, check)


def load_several(adapter: ISRAdapter, parts: Sequence[tuple[Path | str, float]], force_base: bool = False) -> None:
    """Attach several LoRAs as one: they act as the sum of their changes, each times its weight.

    Args:
        adapter: the pipeline that they were trained on; it carries none yet.
        parts: file, folder of a run or "user/name[@revision]", and weight, of each.
        force_base: load although a file says that it was trained on other base weights.

    Raises:
        UserError: as `load`.
    """
    put(adapter, gather(adapter, parts, force_base), f"LoRAs {', '.join(str(source) for source, _ in parts)}")


@torch.no_grad()
def merge_saved(adapter: ISRAdapter, source: Path | str) -> None:
    """Add a saved LoRA, and what was trained in full beside it, into the networks of its base, for good.

    Args:
        adapter: in float32, or loaded in outline; carries no LoRA.
        source: as in `load`.

    Raises:
        UserError: as `load`.
    """
    path = locate(source)
    given = Lora({}, 1, 1.0, in_full=True) if path.name == run_folder.FULL else read(adapter, path)
    if given.in_full:
        _load_full(adapter, path.with_name(run_folder.FULL), 1.0, False)
        full.settle(adapter)
    for (component, module), pair in given.pairs().items():
        layers.add(adapter.networks[component].get_parameter(f"{module}.weight"), pair)
    _compare_options(adapter, {path: given})


def gather(adapter: ISRAdapter, parts: Sequence[tuple[Path | str, float]], force_base: bool = False) -> Lora:
    """Saved LoRAs as one, apart from the pipeline that they were trained on, which may be loaded in outline.

    Args:
        adapter, parts, force_base: as in `load_several`; one part will do.

    Raises:
        UserError: as `load`; or weights were trained in full beside one of them.
    """
    for _, weight in parts:
        _check_strength(weight)
    paths = [locate(source) for source, _ in parts]
    loras = {path: read(adapter, path, force_base) for path in paths if path.name != run_folder.FULL}
    if any(path not in loras or loras[path].in_full for path in paths):
        raise UserError("weights that were trained in full cannot be combined: load a run that has some alone")
    changes: dict[Place, list[Pair]] = {}
    for path, (_, weight) in zip(paths, parts, strict=True):
        for place, pair in loras[path].pairs(weight).items():
            changes.setdefault(place, []).append(pair)
    given = even({place: side_by_side(pairs) for place, pairs in changes.items()})
    alike = all(one.tensors.keys() == given.tensors.keys() for one in loras.values())
    targets = loras[paths[0]].targets if alike else by_component(changes)
    _compare_options(adapter, loras)
    return replace(given, targets=targets)


def _compare_options(adapter: ISRAdapter, loras: Mapping[Path, Lora]) -> None:
    """Warn of LoRAs that were trained with other options than the pipeline has, or than each other."""
    known = {name: (value, "this pipeline") for name, value in _options(adapter).items()}
    for path, one in loras.items():
        others = {name: known.setdefault(name, (value, f"'{path}'")) for name, value in one.options.items()}
        different = [
            f"{shown(name)[1:-1]}={shown(one.options[name])}, but {where} has {shown(value)}"
            for name, (value, where) in others.items()
            if value != one.options[name]
        ]
        if different:
            log.warning("LoRA '%s' was trained with %s: it may do less, or harm", path, "; ".join(different))


def _options(adapter: ISRAdapter) -> dict[str, Any]:
    options = getattr(adapter, "options", None)
    if not isinstance(options, Options):
        return {}
    return options.model_dump(mode="json", include=marked_for_lora(type(options)))


def put(adapter: ISRAdapter, given: Lora, source: str, name: str = NAME) -> None:
    """Attach a LoRA with its tensors, or put them into the one of that name that is attached.

    Raises:
        UserError: it does not fit the pipeline, or is of another rank than the attached one; `source` is named, and
            the pipeline is as it was.
    """
    given = fitted(adapter, given, source)
    if not layers.attached(adapter, name):
        layers.attach(adapter, given.rank, given.alpha, name=name, targets=given.targets)
    elif layers.rank_and_alpha(adapter, name)[0] != given.rank:
        raise UserError(
            f"{source} has rank {given.rank} and alpha {given.alpha:g}, not the rank of the LoRA that is attached"
        )
    layers.load_state_dict(adapter, given.tensors, source, name=name)
    layers.set_alpha(adapter, given.alpha, name)


def fitted(adapter: ISRAdapter, given: Lora, source: str) -> Lora:
    """The LoRA in float32, once all of it is known to fit: nothing is made for one that does not.

    Raises:
        UserError: it does not; `source` is named.
    """
    try:
        targets = adapter.lora_targets if given.targets is None else given.targets
        for component, modules in targets.items():
            target_shapes(adapter, component, modules)
        shapes = {
            f"{component}.{key}": shape
            for component, modules in targets.items()
            for key, shape in tensor_shapes(adapter.networks[component], given.rank, modules).items()
        }
        return replace(given, tensors=layers.checked(shapes, given.tensors))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _check_strength(scale: float) -> None:
    if not math.isfinite(scale):
        raise UserError(f"the strength of a LoRA is {scale}, expected a finite number")


def locate(source: Path | str, name: str = NAME) -> Path:
    """The file of a LoRA: given as such, as the folder of a run, or as "user/name[@revision]" on the Hub.

    Of a run that trained weights in full, and no LoRA, it is the file of these; of one that did not end, that of its
    newest checkpoint.

    Raises:
        UserError: there is none, or the Hub does not give it.
    """
    path = fetch.fetch_lora(str(source)) if fetch.is_reference(str(source)) else expand(source)
    if path.is_dir():
        if name == NAME and (newest := run_folder.with_weights(path)) != path:
            log.info("'%s' did not end, and has no LoRA of its own: taking its checkpoint %s", path, newest.name)
            path = newest
        alone = (path / run_folder.FULL).is_file() and not (path / file_name(name)).is_file()
        path = path / (run_folder.FULL if alone else file_name(name))
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
        return fitted(adapter, Lora(*imported), f"LoRA '{path}'")
    tensors, header = read_safetensors(path)
    if OUR_HEADER not in header:
        raise UserError(f"'{path}' does not say which base it belongs to: not written by rewardsr")
    given, theirs = described(path, tensors, header)
    if not force_base:
        _check_base(adapter, path, theirs)
    return fitted(adapter, given, f"LoRA '{path}'")


def _check_base(adapter: ISRAdapter, path: Path, theirs: BaseModel) -> None:
    """Refuse a LoRA of other weights.

    Raises:
        UserError: those that it was trained on differ from the pipeline's, in the parts that are named.
    """
    ours = adapter.base_model
    if is_early(theirs.fingerprint):
        same, other = matches_early(adapter.networks, theirs.fingerprint), "other weights"
    else:
        same = same_base(ours.fingerprint, theirs.fingerprint)
        other = f"other weights ({', '.join(differing(ours.fingerprint, theirs.fingerprint))})"
    if not same:
        raise UserError(
            f"LoRA '{path}' was trained on base '{shown(theirs.id)[1:-1]}' ({shown(theirs.revision)[1:-1]}), "
            f"{other} than '{ours.id}' ({ours.revision}); --force-base overrides"
        )


def described(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> tuple[Lora, BaseModel]:
    """The LoRA of a file of ours, and the base that it was trained on, as its header says.

    Raises:
        UserError: the header is damaged, or says more than a LoRA of ours is.
    """
    settings = settings_of(path, header)
    about = parse_object(header.get(OUR_HEADER, ""), f"'{path}' has a damaged header")
    try:
        theirs = BaseModel(**about["base"])
        if not all(isinstance(value, str) for value in asdict(theirs).values()):
            raise UserError("base is described by text")
        rank, alpha = rank_of(about["rank"]), alpha_of(about["alpha"])
        for given in settings.values():
            check_settings(given)
            for name, value in {"r": rank, "lora_alpha": alpha, **dict.fromkeys(VARIATIONS)}.items():
                if given.get(name, value) != value and (value is not None or given[name]):
                    raise UserError(f"{name} is {shown(given[name])}, which is none of a LoRA of ours")
        options = about.get("options", {})
        if not isinstance(options, dict):
            raise UserError(f"options are {shown(options)}, expected values by name")
        targets = {
            part: _names(given["target_modules"]) for part, given in settings.items() if "target_modules" in given
        }
    except (UserError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' has a damaged header: {error}") from error
    return Lora(tensors, rank, alpha, targets or None, options, about.get("in_full") is True), theirs


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise UserError(f"target_modules is {shown(value)}, expected a list of names")
    return value


def settings_of(path: Path, header: Mapping[str, str], bare: str | None = None) -> dict[str, dict[str, Any]]:
    """peft's configurations in the header of a file, by component, if it has any.

    Args:
        path: of the file, for messages.
        header: of it; diffusers names settings with their component in front ("unet.lora_alpha").
        bare: component of settings that are named without one.

    Raises:
        UserError: they are damaged, or of no component.
    """
    found: dict[str, dict[str, Any]] = {}
    for key, value in parse_object(header.get(DIFFUSERS_HEADER, "{}"), f"'{path}' has a damaged header").items():
        component, _, name = key.rpartition(".")
        if not component and bare is None:
            raise UserError(f"'{path}' has a damaged header: {shown(key)} is a setting of no component")
        found.setdefault(component or str(bare), {})[name] = value
    return found


def header(adapter: ISRAdapter, given: Lora, only: Iterable[str] | None = None) -> dict[str, str]:
    """Safetensors metadata: the configuration as diffusers reads it, and what ours needs to refuse another base.

    Args:
        adapter: the pipeline that it belongs to.
        given: the LoRA as it goes into the file.
        only: the components whose tensors are in the file; all by default.
    """
    from peft import LoraConfig  # slow to import

    targets = adapter.lora_targets if given.targets is None else given.targets
    diffusers: dict[str, Any] = {}
    for component in targets if only is None else only:
        config = LoraConfig(
            r=given.rank,
            lora_alpha=given.alpha,
            target_modules=list(targets[component]),
            init_lora_weights="gaussian",
        )
        diffusers |= {
            f"{component}.{key}": sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
        }
    about = {**_about(adapter), "rank": given.rank, "alpha": given.alpha}
    if given.in_full:
        about["in_full"] = True
    return {
        DIFFUSERS_HEADER: json.dumps(diffusers, sort_keys=True, default=str),
        OUR_HEADER: json.dumps(about, sort_keys=True),
        "format": "pt",
    }


def _about(adapter: ISRAdapter) -> dict[str, Any]:
    """Which pipeline a file belongs to."""
    from rewardsr import __version__

    return {
        "version": __version__,
        "adapter": adapter.name,
        "licence": adapter.licence,
        "base": asdict(adapter.base_model),
        "options": _options(adapter),
    }
