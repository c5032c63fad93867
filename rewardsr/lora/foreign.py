"""LoRAs of other programs: every tensor and every setting of a file is used, or refused by name."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError, one_line, shown
from rewardsr.lora.original import original_names
from rewardsr.lora.pairs import Lora, Pair, Place, Shape, alpha_of, by_component, even, floats, rank_of
from rewardsr.lora.targets import target_shapes

# How programs end the name of a tensor: peft (with or without the name of the LoRA), kohya, diffusers' training
# scripts, and diffusers' attention processors of old (`processor.to_q_lora.down.weight`).
_ENDING = re.compile(
    r"(?P<stem>.+?)(\.lora_(?P<peft>[AB])(\.[\w-]+)?\.weight|[._]lora[._](?P<way>down|up)\.weight|(?P<alpha>\.alpha))"
)
_DENOISERS = ("unet", "transformer")
_TEXT = re.compile(r"(base_model\.model\.)?(text_encoder|text_model|lora_te|te\d?\.)")

# Settings of peft that say how or on what a LoRA was trained: its tensors hold all that comes of them.
_INERT = {"auto_mapping", "base_model_name_or_path", "ephemeral_gpu_offload", "inference_mode", "lora_dropout"} | {
    *("megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),  # of initialisations, which are looked at
}
# Where the LoRA sits, which its tensors say as well: the two must agree.
_PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
VARIATIONS = ("rank_pattern", "alpha_pattern", "use_rslora")  # of rank and scale, module by module
_NUMBERS = ("r", "lora_alpha", *VARIATIONS)
_NOTHING: tuple[Any, ...] = (None, False, "", "none", [], {})
# Initialisations that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ, ...) take their start out of it.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse a configuration of peft that makes more or something else of a LoRA than alpha / rank B A.

    Raises:
        UserError: the first setting that does, by name.
    """
    for name, value in settings.items():
        plain = (
            str(value).rpartition(".")[2] == "LORA"
            if name == "peft_type"
            else (value.lower() if isinstance(value, str) else value) in _PLAIN_STARTS
            if name == "init_lora_weights"
            else name in _INERT or name in _PLACES or name in _NUMBERS or value in _NOTHING
        )
        if not plain:
            raise UserError(f"{name} is {shown(value)}, which is more than a plain LoRA: not supported")


class Settings:
    """What peft's configuration says of the scale and the places of a LoRA on one component.

    Args:
        given: the configuration; empty where a file brings none, and then the scale is 1.

    Raises:
        UserError: it makes more than a plain LoRA, or is damaged.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        check_settings(given)
        for name, number in (("r", rank_of), ("lora_alpha", alpha_of)):
            if name in given:
                number(given[name])
        self._given = given
        self._patterns = {name: self._pattern(name) for name in ("rank_pattern", "alpha_pattern")}
        self._places = self._located()

    def scale(self, module: str, rank: int, alpha: float | None) -> float:
        """By which B A of a module is multiplied.

        Args:
            module: its name.
            rank: of its tensors.
            alpha: that its own tensor states, if there is one.

        Raises:
            UserError: the configuration contradicts the tensors, or holds no such numbers.
        """
        stated = self._of(module, "rank_pattern", "r")
        if stated is not None and rank_of(stated) != rank:
            raise UserError(f"{module} has rank {rank}, but the settings say {stated}")
        own = self._of(module, "alpha_pattern", "lora_alpha")
        if own is not None and alpha is not None and alpha_of(own) != alpha:
            raise UserError(f"{module} states alpha {alpha:g}, but the settings say {own}")
        chosen = alpha if alpha is not None else rank if own is None else alpha_of(own)
        rooted = self._given.get("use_rslora") or False
        if not isinstance(rooted, bool):
            raise UserError(f"use_rslora is {shown(rooted)}, expected true or false")
        return chosen / (math.sqrt(rank) if rooted else rank)

    def sits_on(self, module: str) -> bool | None:
        """Whether the configuration puts a LoRA on a module; None where it does not say."""
        from peft.tuners.tuners_utils import check_target_module_exists  # slow to import

        return None if self._places is None else bool(check_target_module_exists(self._places, module))

    def _pattern(self, name: str) -> dict[str, Any]:
        found = self._given.get(name) or {}
        if not isinstance(found, dict):
            raise UserError(f"{name} is {shown(found)}, expected numbers by module")
        for key in found:
            _check_expression(key, name)
        return found

    def _of(self, module: str, pattern: str, otherwise: str) -> Any:
        from peft.utils.other import get_pattern_key

        own = self._patterns[pattern]
        return own.get(get_pattern_key(list(own), module), self._given.get(otherwise))

    def _located(self) -> Any:
        """A configuration of peft with the places alone; None where they are an expression: its finds have tensors."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        places = {name: self._given[name] for name in _PLACES if self._given.get(name) not in _NOTHING}
        if not isinstance(places.get("target_modules"), list):
            return None
        try:
            for name in ("exclude_modules", "layers_pattern"):
                found = places.get(name, ())
                for text in [found] if isinstance(found, str) else found:
                    _check_expression(text, name)
            config = LoraConfig(**places)
            check_target_module_exists(config, "a.0.b")
        except UserError:
            raise
        except Exception as error:  # peft checks settings in ways of its own
            raise UserError(f"the settings {', '.join(places)} are damaged: {one_line(error)}") from error
        return config


def _check_expression(text: str, setting: str) -> None:
    """A regular expression of a stranger must not keep the machine busy for ever."""
    if len(text) > 200 or re.search(r"\)[*+{]", text) or len(re.findall(r"[*+{]", text)) > 4:
        raise UserError(f"{setting}: {shown(text)} is too involved: name the modules")
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{setting}: {shown(text)} is no expression: {error}") from error


def read_tensors(
    adapter: ISRAdapter, where: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]]
) -> Lora:
    """A LoRA of all tensors of a file.

    Files may have another rank and alpha for every module; they are brought to one rank and scale without changing what
    B A does. Modules that a file has nothing for are none of the LoRA's.

    Args:
        adapter: whose modules the keys are matched with.
        where: they come from, for messages.
        tensors: by any program's names.
        settings: peft's configuration by component.

    Raises:
        UserError: the first tensor or setting that is left over, contradicts another, or fits no module.
    """
    try:
        return _read(adapter, tensors, settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _read(adapter: ISRAdapter, tensors: Mapping[str, Tensor], settings: Mapping[str, Mapping[str, Any]]) -> Lora:
    shapes = {
        (component, module): shape
        for component in adapter.lora_targets
        for module, shape in target_shapes(adapter, component).items()
    }
    for component in settings.keys() - adapter.lora_targets.keys():
        raise UserError(f"it has settings of '{component}', which adapter '{adapter.name}' does not adapt")
    stated = {component: Settings(settings.get(component, {})) for component in adapter.lora_targets}
    places, found = _places(adapter, shapes), dict[Place, dict[str, tuple[str, Tensor]]]()
    for key in sorted(tensors):
        ending = _ENDING.fullmatch(key)
        place = None if ending is None else places.get(_plain(ending["stem"]))
        if ending is None or place is None:
            raise UserError(_left_over(adapter, key))
        part = "alpha" if ending["alpha"] else ending["peft"] or {"down": "A", "up": "B"}[ending["way"]]
        parts = found.setdefault(place, {})
        if part in parts:
            raise UserError(f"{parts[part][0]} and {key} are two LoRAs on one module: import them one by one")
        parts[part] = key, tensors[key]
    if not found:
        raise UserError("it holds no LoRA tensors")
    pairs = {place: _pair(adapter, place, shapes[place], parts, stated[place[0]]) for place, parts in found.items()}
    for component, module in sorted(shapes.keys() - pairs.keys()):
        if stated[component].sits_on(module):
            raise UserError(f"its settings put a LoRA on {component}.{module}, but its tensors are missing")
    if pairs.keys() == shapes.keys():
        return even(pairs)
    targets = by_component(pairs)
    fitting = {
        (component, module): shape
        for component, modules in targets.items()
        for module, shape in target_shapes(adapter, component, modules).items()
    }
    return replace(even(pairs, fitting), targets=targets)


def _pair(
    adapter: ISRAdapter, place: Place, shape: Shape, parts: Mapping[str, tuple[str, Tensor]], settings: Settings
) -> Pair:
    (component, module), (out, kernel) = place, shape
    for part, other in (("A", "B"), ("B", "A")):
        if part not in parts and other in parts:
            raise UserError(f"{_partner(parts[other][0])} is missing")
        if part not in parts:
            raise UserError(f"{parts['alpha'][0]} stands alone: the matrices of its module are missing")
    a, b = (floats(*parts[part]) for part in "AB")
    rank = len(a) if a.ndim else 0
    if not rank:
        raise UserError(f"{parts['A'][0]} is {tuple(a.shape)}, of rank 0: expected positive numbers")
    if b.ndim > 1 and b.shape[1] != rank:
        raise UserError(
            f"{parts['A'][0]} has rank {rank} and {parts['B'][0]} rank {b.shape[1]}: one belongs to a module of "
            "another size, or to another LoRA"
        )
    flat = a.shape[1:2] == kernel[:1] and {*a.shape[2:], *kernel[1:]} <= {1}  # a linear layer, or a 1x1 convolution
    if not (flat or a.shape[1:] == kernel) or b.shape[:2] != (out, rank) or b.numel() != out * rank:
        raise UserError(f"{component}.{module} belongs to a module of another size in '{adapter.name}'")
    if settings.sits_on(module) is False:
        raise UserError(f"{parts['A'][0]} is on a module that its settings leave out")
    try:
        alpha = alpha_of(parts["alpha"][1]) if "alpha" in parts else None
    except UserError as error:
        raise UserError(f"{parts['alpha'][0]}: {error}") from error
    scale = settings.scale(module, rank, alpha)
    floats(f"alpha / rank times {parts['B'][0]}", scale * b)
    return Pair(a.reshape(rank, *kernel), b.reshape(out, rank, *[1] * (len(kernel) - 1)), scale)


# ---- names ----


def _partner(key: str) -> str:
    """The other of a module's two matrices, in the same manner of naming."""
    for one, other in (("down", "up"), ("up", "down"), ("lora_A", "lora_B"), ("lora_B", "lora_A")):
        stem, found, end = key.rpartition(f"{one}.")
        if found:
            return f"{stem}{other}.{end}"
    raise ValueError(key)


def denoiser_of(adapter: ISRAdapter) -> str | None:
    """The component that names without a component belong to."""
    components = list(adapter.lora_targets)
    return next((one for one in components if one in _DENOISERS), components[0] if len(components) == 1 else None)


def _places(adapter: ISRAdapter, shapes: Mapping[Place, Shape]) -> dict[str, Place]:
    """Every way in which programs name the modules that the adapter adapts."""
    denoiser = denoiser_of(adapter)
    original = original_names(adapter.networks.get("unet"))
    made: dict[str, set[Place]] = {}
    for component, module in shapes:
        names = {module, module.replace("to_out.0", "to_out")}
        if component == "unet":
            names |= {found for name in names if (found := original(name)) is not None}
        for name in names:
            stems = [f"{component}.{name}", f"lora_{component}_{name.replace('.', '_')}"]
            if component == denoiser:
                stems += [f"diffusion_model.{name}", name]
            for stem in stems:
                made.setdefault(stem, set()).add((component, module))
    return {stem: places.pop() for stem, places in made.items() if len(places) == 1}


def _plain(stem: str) -> str:
    """A module's name without what programs wrap a network or a layer in."""
    stem = re.sub(r"^((?:\w+\.)?)base_model\.model\.", r"\1", stem)
    return re.sub(r"^model\.(?=diffusion_model\.)", "", stem).replace(".processor.", ".")


def _left_over(adapter: ISRAdapter, key: str) -> str:
    said = f"{key} is no LoRA tensor of a module that adapter '{adapter.name}' adapts"
    return f"{said}: it is a text encoder's; save the LoRA without that part" if _TEXT.match(key) else said
