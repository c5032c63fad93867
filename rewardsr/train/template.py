"""A recipe with every key that there is, commented: what it means, what it may be, and its default."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rewardsr.catalogue import options_of
from rewardsr.data.degrade.contract import degradation_options
from rewardsr.errors import UserError, nearest
from rewardsr.options import Option, Options, describe
from rewardsr.train.recipe import DegradationRecipe, Recipe

WIDTH = 100
# Values that stand in for what only the user knows, and choices without which a run of the kind cannot start.
_PLACES = {"base": "models/base", "output": "runs/first", "steps": 1000, "data.train": "data/train"}
_SUITED: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("osediff", "gdpo"): {"adapter_options.noise_t": 250},  # without noise there is no group to compare
}
_REWARDS = {
    "gdpo": [{"name": "psnr", "weight": 0.5}, {"name": "detail", "weight": 0.5}],
    "rfsr": [{"name": "detail_correlation", "weight": 2.0}],
}
_LARGE = ("seesr", "sd_upscaler")  # two networks, or guidance, in each step
# What fits a card at 512 px, by bytes counted of the real steps at SD 2.1's size (tests/benchmarks) and 2 GB for CUDA:
# batch size of one-step pipelines and StableSR, of `_LARGE`, and whether either is checkpointed.
_BATCHES: Mapping[str, Mapping[str, tuple[int, int, bool, bool]]] = {
    "gdpo": {
        "12gb": (1, 1, False, True),
        "16gb": (1, 1, False, True),
        "24gb": (2, 1, False, False),
        "80gb": (8, 4, False, False),
    },
    "rfsr": {
        "12gb": (1, 1, False, True),
        "16gb": (2, 1, False, False),
        "24gb": (3, 2, False, False),
        "80gb": (8, 4, False, False),
    },
    "naosd": {
        "12gb": (1, 1, True, True),
        "16gb": (4, 1, True, True),
        "24gb": (4, 2, True, True),
        "80gb": (8, 4, True, True),
    },
}
_CPU = {"device": "cpu", "precision": "fp32", "batch_size": 4, "data.crop": 64, "data.validation_side": 256}
PRESETS = ("12gb", "16gb", "24gb", "80gb", "cpu")


def template(adapter: str, trainer: str, preset: str | None = None) -> str:
    """The recipe as YAML, which `load_recipe` takes as it is once its paths are filled in.

    Args:
        adapter: registered name, or `module:Name`.
        trainer: the same.
        preset: one of `PRESETS`: sets what a card or the CPU needs.

    Raises:
        UserError: unknown adapter, trainer or preset; or no preset for that trainer.
    """
    own = {"adapter_options": options_of("adapters", adapter), "trainer_options": options_of("trainers", trainer)}
    chosen: dict[str, Any] = {"adapter": adapter, "trainer": trainer, **_PLACES, **_SUITED.get((adapter, trainer), {})}
    chosen["rewards"] = _REWARDS.get(trainer, [])
    said = "Paths and steps are examples: fill in your own."
    if preset is not None:
        fitting, why = _preset(adapter, trainer, preset)
        chosen |= fitting
        said += f" {why}"
    options = f"`rewardsr adapters {adapter}`, `rewardsr trainers {trainer}`, `rewardsr rewards NAME`"
    lines = [*_comment(f"rewardsr finetune THIS_FILE. {said} Every key is here; what is left out has its default."), ""]
    lines += [*_comment(f"The options alone: {options}, `rewardsr degradations NAME`."), ""]
    lines += _section(Recipe, "", chosen, own)
    return "\n".join(lines) + "\n"


def _preset(adapter: str, trainer: str, preset: str) -> tuple[dict[str, Any], str]:
    """What a preset sets, and where that comes from."""
    if preset not in PRESETS:
        raise UserError(f"unknown preset '{preset}': {nearest(preset, PRESETS)}")
    if preset == "cpu":
        base = {"base": "embedded"} if adapter == "osediff" else {}
        return _CPU | base, "Preset cpu: sizes of the demo, for the embedded pipeline or another small one."
    if trainer not in _BATCHES:
        raise UserError(f"no preset for trainer '{trainer}': there are some for {', '.join(_BATCHES)}, and cpu")
    one, large, *checkpointed = _BATCHES[trainer][preset]
    is_large = adapter in _LARGE
    found: dict[str, Any] = {
        "device": "cuda",
        "precision": "bf16",
        "batch_size": large if is_large else one,
        "gradient_checkpointing": checkpointed[is_large],
        "data.crop": 512,
    }
    if trainer != "naosd" or preset != "80gb":
        found["trainer_options.micro_batch"] = "auto"
    return found, (
        f"Preset {preset}: follows from bytes counted of a step at SD 2.1's size and 512 px (tests/benchmarks) "
        "and 2 GB for CUDA; not measured on that card, try --dry-run. An 8-bit optimiser would save next to nothing: a "
        "LoRA's moments are small."
    )


def _section(
    model: type[Options], prefix: str, chosen: Mapping[str, Any], own: Mapping[str, type[Options]]
) -> Iterator[str]:
    """The lines of a section, one level in for each dot of `prefix`."""
    indent = "  " * prefix.count(".")
    by_name = {option.name: option for option in describe(model)}
    for name, entry in model.model_fields.items():
        key, kind = f"{prefix}{name}", entry.annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            yield from ("", *_comment(entry.description or (kind.__doc__ or "").partition("\n")[0], indent))
            yield f"{indent}{name}:"
            yield from _degradation(indent) if key == "data.degradation" else _section(kind, f"{key}.", chosen, own)
            continue
        if key in own:
            yield ""
            yield from _comment(f"options of {key.partition('_')[0]} '{chosen[key.partition('_')[0]]}'", indent)
            yield f"{indent}{name}:{'' if own[key].model_fields else ' {}'}"
            yield from _section(own[key], f"{key}.", chosen, {})
            continue
        default = None if entry.is_required() else entry.get_default(call_default_factory=True)
        yield from _told(by_name[name], indent)
        yield from _written(name, chosen.get(key, default), indent)


def _degradation(indent: str) -> Iterator[str]:
    """The degradation of a recipe that names none, with its options."""
    section = DegradationRecipe()
    by_name = {option.name: option for option in describe(options_of("degradations", section.name))}
    for name, value in degradation_options(section).items():
        about = by_name.get(name) or describe(DegradationRecipe)[0]
        yield from _told(about, f"{indent}  ")
        yield from _written(name, value, f"{indent}  ")


def _told(option: Option, indent: str) -> Iterator[str]:
    bounds = f", {option.bounds}" if option.bounds else ""
    default = option.default if option.default == "required" else f"default {option.default}"
    yield from _comment(f"{option.description} ({option.type}{bounds}; {default})", indent)


def _comment(text: str, indent: str = "") -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent), break_long_words=False)]


def _written(name: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, list | tuple):
        value = [entry.model_dump(mode="json") if isinstance(entry, Options) else entry for entry in value]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        yield f"{indent}{name}:"
        yield from (f"{indent}  - {_flow(entry)}" for entry in value)
    else:
        none = name == "validation" and not value  # which takes a path, and null for none
        yield f"{indent}{name}: {_flow(None if none else value)}"


def _flow(value: Any) -> str:
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, sort_keys=False, width=10_000, default_flow_style=True, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
