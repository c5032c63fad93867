"""Where every command and the Python API get a pipeline: loaded, taken from memory, or as a run left it."""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rewardsr import lora, plugins
from rewardsr.adapter import ISRAdapter
from rewardsr.errors import UserError, shown
from rewardsr.hub.fetch import EMBEDDED, fetch_lora, is_reference
from rewardsr.lora.pairs import Lora
from rewardsr.options import parse
from rewardsr.outline import outlined
from rewardsr.places import is_place
from rewardsr.plugins import names, resolve_class
from rewardsr.progress import waiting
from rewardsr.rewards import is_plugin
from rewardsr.run_folder import RECIPE, of_checkpoint
from rewardsr.storage import expand
from rewardsr.train import recipe as recipes
from rewardsr.train.recipe import Recipe

logger = logging.getLogger(__name__)

EMBEDDED_OPTIONS = {"noise_t": 250}  # that it was trained with; without noise it draws nonsense
LOADING = {"weights", "revision"}  # options of adapters that a live pipeline has no use for


def load_adapter(
    name: str,
    base: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> ISRAdapter:
    """Load a pipeline behind the adapter interface.

    Args:
        name: registered adapter ("osediff"), or `module:Name`.
        base: local diffusers folder, Hub id, or "embedded" for the small pipeline that comes along.
        device: where the networks go.
        dtype: precision that they compute in; a LoRA stays float32.
        options: of the adapter (`rewardsr adapters NAME` lists them); "embedded" has `noise_t=250` by default.

    Raises:
        UserError: unknown adapter or option, or the base cannot be had, read or fitted.
    """
    with waiting(f"loading {base}"):
        return _load(name, str(base), options).to(device, dtype)


def _load(name: str, base: str, options: Mapping[str, Any]) -> ISRAdapter:
    kind = adapter_class(name)
    if (name, base) == ("osediff", EMBEDDED):
        options = {**EMBEDDED_OPTIONS, **options}
    return kind.load(base, adapter_options(name, options))


def wrap(pipe: Any, name: str | None = None, **options: Any) -> ISRAdapter:
    """Put a pipeline that is in memory already behind the adapter interface.

    Its networks are shared, not copied: a LoRA trained or loaded through the adapter works in the pipeline, too. They
    stay on their device and in their precision, and are frozen.

    Args:
        pipe: an object with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`, as diffusers' pipelines are.
        name: registered adapter, or `module:Name`; by default the one that fits.
        options: of the adapter, but for what is loaded from where.

    Raises:
        UserError: no adapter fits (the known ones are named), several do, or parts or options do not.
    """
    for part in ("unet", "transformer", "vae", "text_encoder", "controlnet"):
        if type(network := _part(pipe, part)).__name__ in ("DataParallel", "DistributedDataParallel"):
            raise UserError(
                f"the {part} of {type(pipe).__name__} is in a {type(network).__name__}: put its .module there"
            )
    kinds, broken = {}, []
    for key in names("adapters") if name is None else [name]:
        try:
            kinds[key] = adapter_class(key)
        except UserError as error:
            if name is not None:
                raise
            broken.append(str(error))  # a stranger's, and perhaps not the one that is needed
    fitting = [key for key, kind in kinds.items() if name is not None or _fits(kind, pipe)]
    if len(fitting) != 1:
        found = f"these do: {', '.join(fitting)}; give name=" if fitting else f"known: {', '.join([*kinds, *broken])}"
        raise UserError(f"expected one adapter that fits {type(pipe).__name__}; {found} (or give name='module:Name')")
    for option in LOADING & options.keys():
        raise UserError(f"wrap: '{option}' says what to load, and this pipeline is in memory already: leave it out")
    return kinds[fitting[0]].from_pipeline(pipe, adapter_options(fitting[0], options))


def _part(pipe: Any, name: str) -> Any:
    try:
        return getattr(pipe, name, None)
    except Exception:  # as in _fits
        return None


def _fits(kind: Any, pipe: Any) -> bool:
    try:
        return bool(kind.fits(pipe))
    except Exception:  # the object may be anything, with any attributes
        return False


def load_lora(
    target: Any, source: Path | str | Mapping[str, float], scale: float = 1.0, force_base: bool = False
) -> ISRAdapter:
    """Load a LoRA, or several, into an adapter or a live pipeline.

    Args:
        target: an adapter, or a pipeline object, which is wrapped first (see `wrap`) and works with the LoRA as it is.
        source: file, folder of a run, or "user/name[@revision]" on the Hub; or several of them with their weights.
        scale: strength, of all.
        force_base: load although it was trained on other base weights.

    Returns:
        The adapter.

    Raises:
        UserError: as `wrap` and `rewardsr.lora.file.load`.
    """
    adapter = target if isinstance(target, ISRAdapter) else wrap(target)
    if isinstance(source, Mapping):
        lora.load_several(adapter, [(one, scale * weight) for one, weight in source.items()], force_base)
    else:
        lora.load(adapter, source, scale, force_base)
    return adapter


def adapter_class(name: str) -> type[ISRAdapter]:
    """The adapter of this name.

    Args:
        name: registered adapter, or `module:Name`.

    Raises:
        UserError: there is none, or it breaks the contract.
    """
    return resolve_class("adapters", name, ISRAdapter)  # type: ignore[type-abstract]  # only its subclasses are made


def adapter_options(name: str, given: Mapping[str, Any]) -> Any:
    """Options of an adapter, checked, defaults filled in: an instance of its `Options`.

    Args:
        name: registered adapter, or `module:Name`.
        given: what was chosen; values of the right kind may come as text.

    Raises:
        UserError: unknown adapter, an option that it does not have (the nearest is named), or a value it cannot have.
    """
    return parse(adapter_class(name).Options, given, f"adapter '{name}'")


def choose_device(device: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """The device, and the precision that the base computes in there.

    "auto" is bf16 on a CUDA card that computes in it, which those before compute capability 8.0 (V100, T4, RTX 20) only
    emulate; everywhere else it is fp32.

    Raises:
        UserError: a device that this machine or this build of torch does not have.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"unknown precision '{precision}': choose auto, fp32 or bf16")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, there in available.items() if there)
    if device not in available:
        raise UserError(f"unknown device '{device}': choose auto, {', '.join(sorted(available))}")
    if not available[device]:
        raise UserError(
            f"device {device} was asked for, but torch {torch.__version__} finds none: use --device cpu, or auto"
        )
    chosen = torch.device(device)
    if device == "cuda":  # each process of a launch has its own
        chosen = torch.device("cuda", _local_rank(torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
    if precision == "auto":
        precision = "bf16" if device == "cuda" and _has_bf16(chosen) else "fp32"
    return chosen, torch.bfloat16 if precision == "bf16" else torch.float32


@cache
def _has_bf16(device: torch.device) -> bool:
    """Whether a CUDA device, the current one, computes in bfloat16; the note that it does not is given once."""
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return True
    logger.warning(
        "%s (%s) does not compute in bf16: the base is in fp32, which takes about twice the memory and is slower; "
        "precision bf16 would be emulated: it saves memory alone",
        device,
        torch.cuda.get_device_name(device),
    )
    return False


def _local_rank(devices: int) -> int:
    said = os.environ.get("LOCAL_RANK") or "0"
    if not (said.isascii() and said.isdecimal() and int(said) < devices):
        raise UserError(f"LOCAL_RANK is {shown(said)}, and there are {devices} CUDA devices: start one process on each")
    return int(said)


def open_run(
    run: str | None = None,
    adapter: str = "osediff",
    base: str | None = None,
    options: Sequence[str] | None = None,
    loras: Sequence[str] | None = None,
    *,
    strength: float = 1.0,
    device: str | None = "auto",
    precision: str | None = None,
    force_base: bool = False,
) -> tuple[ISRAdapter, Recipe | None]:
    """Load a pipeline and, where there is one, its LoRA.

    Args:
        run: folder of a run or of a checkpoint in it, or "user/name[@revision]" on the Hub; its recipe names adapter,
            base and options, and its LoRA is loaded. A recipe from the Hub is a stranger's: it names registered
            plug-ins only, and no place here.
        adapter: without a run.
        base: without a run; beside one, where the run's base lies here.
        options: `key=value` strings; they override those of the recipe.
        loras: LoRA files, folders or Hub references, instead of the run's; `:weight` behind one is its share.
        strength: scale of the LoRA.
        device: as in a recipe; None leaves the pipeline as it is loaded, in float32 on the CPU.
        precision: as in a recipe; None: the run's, else auto.
        force_base: load the LoRA although it belongs to another base.

    Returns:
        The pipeline, and the recipe of the run.

    Raises:
        UserError: neither run nor base, or anything that cannot be had.
    """
    chosen = _choose(run, adapter, base, options, loras, strength)
    stated = precision or (chosen.recipe.precision if chosen.recipe else "auto")
    where = None if device is None else choose_device(device, stated)
    pipeline = chosen.load() if where is None else chosen.load().to(*where)
    if len(chosen.parts) == 1:
        lora.load(pipeline, *chosen.parts[0], force_base)
    elif chosen.parts:
        lora.load_several(pipeline, chosen.parts, force_base)
    return pipeline, chosen.recipe


def open_outline(
    run: str | None = None,
    adapter: str = "osediff",
    base: str | None = None,
    options: Sequence[str] | None = None,
    loras: Sequence[str] | None = None,
    *,
    strength: float = 1.0,
    force_base: bool = False,
) -> tuple[ISRAdapter, Lora | None]:
    """A pipeline in outline (`rewardsr.outline`), for what a LoRA fits; and the LoRA as one, its strength taken in.

    Args: as `open_run`.

    Returns:
        The pipeline, and the LoRA; None where neither run nor LoRAs are given.

    Raises:
        UserError: as `open_run`; or weights were trained in full beside a LoRA.
    """
    chosen = _choose(run, adapter, base, options, loras, strength)
    with outlined():
        pipeline = chosen.load()
    return pipeline, lora.gather(pipeline, chosen.parts, force_base) if chosen.parts else None


class _Chosen(NamedTuple):
    """A pipeline and its LoRAs, before anything of them is loaded."""

    adapter: str
    base: str
    options: Mapping[str, Any]
    parts: Sequence[tuple[str, float]]
    recipe: Recipe | None
    stranger: str | None  # the run on the Hub that names the pipeline
    given: Sequence[str]  # texts among the options that the user gave

    def load(self) -> ISRAdapter:
        """The pipeline, in float32 on the CPU."""
        with plugins.registered_only(f"the run '{self.stranger}'", self.given) if self.stranger else nullcontext():
            return _load(self.adapter, self.base, self.options)


def _choose(
    run: str | None,
    adapter: str,
    base: str | None,
    options: Sequence[str] | None,
    loras: Sequence[str] | None,
    strength: float,
) -> _Chosen:
    if not math.isfinite(strength):
        raise UserError(f"strength is {strength}, expected a finite number")
    given = recipes.assignments_of(list(options or ()), "--option")
    parts = [weighted(text) for text in loras or ()]
    recipe, stranger = None, None
    settings: dict[str, Any] = {}
    if run is not None:
        stranger = run if is_reference(run) else None
        folder = fetch_lora(run) if stranger else expand(run)
        recipe = recipes.load_recipe(str(of_checkpoint(folder) / RECIPE), {}, [])
        if stranger:
            _check_stranger(recipe, run, base is None, given)
        adapter, base, settings = recipe.adapter, base or recipe.base, dict(recipe.adapter_options)
        parts = parts or [(str(folder), 1.0)]
    if base is None:
        raise UserError(
            "say which pipeline: --run FOLDER of a run, or --base with a diffusers folder, a Hub id or 'embedded'"
        )
    texts = [value for value in given.values() if isinstance(value, str)]
    weighed = [(source, strength * weight) for source, weight in parts]
    return _Chosen(adapter, base, settings | given, weighed, recipe, stranger, texts)


def _check_stranger(recipe: Recipe, run: str, uses_base: bool, given: Mapping[str, Any]) -> None:
    """A stranger's recipe must not choose what is imported and called here, nor which files of this machine are read.

    Names that options hold (`tagger`) are left to the resolver; all others are looked up now, those that only training
    or an evaluation would use among them.
    """
    data = recipe.data
    named = (*(entry.name for entry in recipe.rewards), *(entry.name for entry in recipe.guards))
    rewards = [name for name in named if is_plugin(name)]
    with plugins.registered_only(f"the run '{run}'"):
        plugins.check("adapters", recipe.adapter)
        plugins.check("trainers", recipe.trainer)
        plugins.check("degradations", data.degradation.name)
        for kind, found in (("rewards", rewards), ("captioners", [data.captioner] if data.captioner else [])):
            for name in found:
                plugins.check(kind, name)
    places = {f"adapter option {key}": value for key, value in recipe.adapter_options.items() if key not in given}
    places |= {f"degradation option {key}": value for key, value in (data.degradation.model_extra or {}).items()}
    places |= {f"captioner option {key}": value for key, value in data.captioner_options.items()}
    for what, value in places.items():
        for text in _texts(value):
            if is_place(text):
                raise UserError(
                    f"the run '{run}' names a place on a disk as {what}, {shown(text)}, which a run from the Hub may "
                    "not: give the option yourself (--option KEY=VALUE), or pull it and look at its recipe.yaml"
                )
    if uses_base and recipe.base != EMBEDDED and not is_reference(recipe.base):
        raise UserError(
            f"the run '{run}' was trained on a base of its author's disk, {shown(recipe.base)}: say where it "
            "lies here, --base PATH"
        )


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _texts(key)
            yield from _texts(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _texts(entry)


def weighted(text: str) -> tuple[str, float]:
    """A LoRA and its weight, of `source` (weight 1) or `source:0.7`; a path that is there is one, whatever its name.

    Raises:
        UserError: the weight is not finite.
    """
    source, _, weight = text.rpartition(":")
    if not source or os.path.lexists(expand(text)):
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:  # no weight: a colon of the path's own
        return text, 1.0
    if not math.isfinite(value):
        raise UserError(f"--lora {text}: the weight is not a finite number")
    return source, value
