"""Recipes: everything that determines a run, validated before anything is loaded."""

import re
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from rewardsr.errors import UserError, one_line, shortened, shown
from rewardsr.options import Count, Options, Seed, parse
from rewardsr.storage import expand, read_text

LARGEST = 100_000  # bytes of a recipe; the longest of ours has 3,000
MOST_VALUES, DEEPEST = 10_000, 50  # in a recipe, once its aliases are followed


def _of_user(text: str) -> str:
    """A path with `~` replaced; whatever else it is (a Hub id, say) stays as it is written."""
    full = expand(text)
    return str(full) if text.startswith("~") else text


_Place = Annotated[str, AfterValidator(_of_user)]


class RewardRecipe(Options):
    """One reward and how much it counts."""

    name: str = Field(description="built-in name, pyiqa metric id, or module:Name")
    weight: float = Field(1.0, ge=0, le=1e6, description="0 only watches: the score is logged and does not steer")
    options: dict[str, Any] = Field(default_factory=dict, description="of the reward itself (weights: local path, ...)")


class DegradationRecipe(Options):
    """How HQ images are made LQ: a name, and beside it the options of that degradation, which checks them itself."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("light", description="registered name (realesrgan, light, bicubic, none), or module:Name")


class ProtocolRecipe(Options):
    """How images reach the pipeline: in a run's training and validation, and in whatever is done with the run later."""

    degradation: DegradationRecipe = Field(
        default_factory=DegradationRecipe, description="for HQ folders; pairs ignore it"
    )
    prompts: str = Field(
        "adapter",
        description="adapter: its own prompt; sidecar: the .txt beside each image; captioner: data.captioner; "
        "else one text for all",
    )
    captioner: str | None = Field(None, description="registered name, or module:Name; with prompts: captioner")

    def prompted(self, prompts: str | None) -> "ProtocolRecipe":
        """The same with other prompts; None: as they are. A captioner goes where it is not asked."""
        chosen = self.prompts if prompts is None else prompts
        captioner = self.captioner if chosen == "captioner" else None
        return ProtocolRecipe(degradation=self.degradation, prompts=chosen, captioner=captioner)


class DataRecipe(ProtocolRecipe):
    """Where images come from, and how they reach the pipeline."""

    train: _Place = Field(description="folder of HQ images, or of paired lq/ and gt/ folders matched by name")
    validation: _Place | None = Field(None, description="the same for held-out images; None: no validation")
    crop: int = Field(512, ge=1, le=16_384, description="side of the HQ crops in pixels")
    flip: bool = Field(True, description="mirror crops at random")
    workers: int | None = Field(
        None,
        ge=0,
        le=64,
        description="threads a process that decode and degrade beside the step; 0: none; null: as many as cores allow",
    )
    validation_limit: Count | None = Field(None, description="the first so many held-out images")
    validation_side: int | None = Field(
        None, ge=1, le=65_536, description="cut larger held-out images to this many HQ pixels a side"
    )


class LoraRecipe(Options):
    """The LoRA that is trained."""

    rank: int = Field(4, ge=1, le=4096, description="more than a layer is wide would be for nothing")
    alpha: float = Field(
        8.0, gt=0, le=1e6, description="the LoRA is scaled by alpha / rank; the papers' files have 8 at rank 4"
    )
    init: _Place | None = Field(
        None,
        description="start from this LoRA (rewardsr safetensors, or GDPO-SR's .pkl), whose rank and alpha these must "
        "be; the reference of a method is the pipeline without it",
    )


_Beta = Annotated[float, Field(ge=0, lt=1)]


LEARNING_RATES = {"adamw": 5e-5, "adamw8bit": 5e-5, "prodigy": 1.0, "adafactor": 1e-2}  # unless the recipe says one


class OptimiserRecipe(Options):
    """How weights follow their gradients, the learning rate over time, and gradient clipping."""

    name: Literal["adamw", "adamw8bit", "prodigy", "adafactor"] = Field(
        "adamw",
        description="adamw8bit (bitsandbytes) keeps moments of 4096 weights and more in 8 bits; prodigy (prodigyopt) "
        "finds the size of its steps; adafactor keeps row and column means instead of moments. These three wait for "
        "the device at each tensor",
    )
    learning_rate: float = Field(
        5e-5,
        gt=0,
        le=10,
        description="about what AdamW moves a weight by in an update; prodigy: factor on what it finds, 1 by default; "
        "adafactor: largest share of a tensor's root mean square, 0.01 by default",
    )
    betas: tuple[_Beta, _Beta] | None = Field(
        (0.9, 0.999), description="of the moving averages; 1 would never learn; adafactor has none"
    )
    weight_decay: float = Field(0.01, ge=0, le=10, description="times the learning rate: share taken from the weights")
    eps: float = Field(1e-8, ge=1e-18, le=1, description="keeps the root of a second moment, which divides, off 0")
    warmup: int = Field(0, ge=0, le=10**9, description="updates over which the learning rate rises linearly")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="after warm-up; cosine falls to 0 at the end"
    )
    clip: float = Field(1.0, gt=0, le=1e9, description="largest norm of the gradient")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, content: Any) -> Any:
        """Defaults that depend on the optimiser."""
        if not isinstance(content, dict):
            return content
        name = str(content.get("name", "adamw"))
        own = {"learning_rate": LEARNING_RATES[name]} if name in LEARNING_RATES else {}
        return own | ({"betas": None} if name == "adafactor" else {}) | content

    @model_validator(mode="after")
    def _betas_where_they_act(self) -> Self:
        if (self.betas is None) != (self.name == "adafactor"):
            raise ValueError("betas: adafactor has none, every other optimiser needs two")
        return self


class Recipe(Options):
    """A fine-tuning run. Paths are relative to the folder that the command runs in."""

    adapter: str = Field("osediff", description="registered name, or module:Name")
    base: _Place = Field(description="local diffusers folder, Hub id, or 'embedded' for the pipeline that comes along")
    adapter_options: dict[str, Any] = Field(default_factory=dict)
    trainer: str = Field("gdpo", description="registered name, or module:Name")
    trainer_options: dict[str, Any] = Field(default_factory=dict)
    rewards: list[RewardRecipe] = Field(
        default_factory=list, description="what steers the trainer; a supervised one has none that weigh more than 0"
    )
    guards: list[str] = Field(["psnr", "ssim"], description="metrics watched at validation that do not steer")
    data: DataRecipe
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    optimiser: OptimiserRecipe = Field(default_factory=OptimiserRecipe)
    output: _Place = Field(description="folder of the run; must be new or empty, unless resumed")
    steps: int = Field(ge=1, lt=10**8, description="optimiser steps; files of a step have eight digits")
    batch_size: int = Field(1, ge=1, le=4096, description="images per process and pass")
    accumulate: int = Field(1, ge=1, le=4096, description="passes whose gradients make one step")
    updates_per_group: int = Field(
        1, ge=1, le=4096, description="optimiser updates on each sampled group, with fresh noise"
    )
    seed: Seed = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the base; auto: bf16 where CUDA has it, else fp32"
    )
    gradient_checkpointing: bool = False
    compile: bool = Field(
        False,
        description="compile the networks (torch.compile) for the steps; takes minutes at the start, and gcc. Held-out "
        "images are scored uncompiled",
    )
    cuda_graphs: bool = Field(
        False,
        description="record the network's calls in the second step and replay them, which spares a fast card most of "
        "the launching; keeps the memory of a pass. Held-out images are scored without",
    )
    validate_every: Count = 100
    checkpoint_every: Count = 100
    keep_checkpoints: Count = 2
    max_skipped: Count = Field(10, description="stop after this many steps in a row that were not finite")
    log_with: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _unique_rewards(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError("rewards: a name occurs twice")
        return self


# What a resumed run may change without becoming another run.
FREE_ON_RESUME = {"output", "steps", "checkpoint_every", "keep_checkpoints", "log_with", "max_skipped", "device"}


def load_recipe(path: str | None, overrides: dict[str, Any], assignments: list[str]) -> Recipe:
    """The recipe of a run.

    Args:
        path: YAML file; None starts from nothing.
        overrides: top-level or dotted keys with their values; None values are left out.
        assignments: `a.b=c` strings, the value read as YAML; they come last.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest is named), a missing or a wrong value.
    """
    content = {} if path is None else _read(path)
    for key, value in overrides.items():
        if value is not None:
            assign(content, key, value)
    for key, value in assignments_of(assignments, "--set").items():
        assign(content, key, value)
    return parse(Recipe, content, path or "recipe")


def assignments_of(texts: list[str], option: str) -> dict[str, Any]:
    """`key=value` strings of a command-line option; values are read as YAML.

    Raises:
        UserError: one of them is not of that form.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        where = f"{option} {shortened(text, 80)}"
        if not equals or not all(part.strip() for part in key.split(".")):
            raise UserError(f"{where}: expected key=value")
        found[key.strip()] = _yaml(value, where)
    return found


def parse_rewards(text: str) -> list[dict[str, Any]]:
    """`name=weight,...` as the recipe's list of rewards; a name alone has weight 1.

    Raises:
        UserError: a weight is not a number.
    """
    found = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, weight = entry.partition("=")
        try:
            found.append({"name": name.strip(), "weight": float(weight or 1)})
        except ValueError as error:
            raise UserError(f"--rewards {entry}: the weight is not a number") from error
    return found


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def differences(one: Recipe, other: Recipe) -> list[str]:
    """Top-level keys in which two recipes differ so that they are different runs.

    Where images lie makes none, nor in how many threads they are read.
    """
    left, right = (recipe.model_dump(mode="json") for recipe in (one, other))
    for recipe in (left, right):
        recipe["data"] |= {"train": "", "validation": bool(recipe["data"]["validation"]), "workers": None}
    return [key for key in left if key not in FREE_ON_RESUME and left[key] != right[key]]


def _read(path: str) -> dict[str, Any]:
    what = f"recipe '{shortened(path, 100)}'"
    content = _yaml(read_text(expand(path), what, LARGEST), what)
    if not isinstance(content, dict):
        raise UserError(f"{what} is not a mapping of keys to values")
    return content


def _yaml(text: str, where: str) -> Any:
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {shortened(' '.join(str(error).split()), 200)}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not valid YAML: it is nested too deeply") from error
    except Exception as error:  # a value that is not of its tag makes Python stumble in many ways: !!bool x, 2026-13-45
        raise UserError(f"{where} is not valid YAML: a value does not read as what it is: {one_line(error)}") from error
    _check_size(content, where)
    return content


def _check_size(content: Any, where: str) -> None:
    """Refuse what grows or never ends when its aliases are followed, and text that no file can hold."""
    level = [content]
    seen = 0
    for _ in range(DEEPEST):
        seen += len(level)
        if seen > MOST_VALUES:
            raise UserError(f"{where} holds more than {MOST_VALUES:,d} values")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise UserError(f"{where} holds half of a surrogate pair, which is no character: {shown(value)}")
            if isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list | tuple | set):
                below += value
            if len(below) > MOST_VALUES:
                break
        level = below
        if not level:
            return
    raise UserError(f"{where} is nested more than {DEEPEST} levels deep")


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 5e-5 (no dot) as the number it is meant as, and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"the key '{key.value}' occurs twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_VALUES:  # merge keys can multiply at each level
            raise yaml.YAMLError(f"a mapping has more than {MOST_VALUES:,d} keys")


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def assign(content: Any, dotted: str, value: Any) -> None:
    """Set a key in sections and lists; `rewards.0.weight` is that of the first reward."""
    *parents, last = (part.strip() for part in dotted.split("."))
    for place, part in enumerate(parents):
        if isinstance(content, list):
            content = content[_index(content, part, dotted)]
        else:
            if content.get(part) is None:
                content[part] = {}
            content = content[part]
        if not isinstance(content, dict | list):
            raise UserError(f"'{dotted}': '{'.'.join(parents[: place + 1])}' is a value, not a section")
    content[_index(content, last, dotted) if isinstance(content, list) else last] = value


def _index(content: list[Any], part: str, dotted: str) -> int:
    if part.isascii() and part.isdecimal() and len(part) < 10 and int(part) < len(content):
        return int(part)
    held = f"0 to {len(content) - 1}" if content else "nothing: it is empty"
    raise UserError(f"'{dotted}': '{shortened(part, 40)}' is not in the list, which has {held}")
