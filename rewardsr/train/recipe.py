"""Recipes: everything that determines a run, validated before anything is loaded."""

import re
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import ConfigDict, Field, model_validator

from rewardsr.errors import UserError
from rewardsr.options import Options, parse


class RewardRecipe(Options):
    """One reward and how much it counts."""

    name: str = Field(description="built-in name, pyiqa metric id, or module:Name")
    weight: float = Field(1.0, ge=0, description="0 only watches: the score is logged and does not steer")
    options: dict[str, Any] = Field(default_factory=dict, description="of the reward itself (weights: local path, ...)")


class DegradationRecipe(Options):
    """How HQ images are made LQ: a name, and beside it the options of that degradation, which checks them itself."""

    model_config = ConfigDict(extra="allow")

    name: str = Field("light", description="registered name (light, bicubic), or module:Name")


class DataRecipe(Options):
    """Where images come from."""

    train: str = Field(description="folder of HQ images, or of paired lq/ and gt/ folders matched by name")
    validation: str | None = Field(None, description="the same for held-out images; None: no validation")
    crop: int = Field(512, ge=1, description="side of the HQ crops in pixels")
    degradation: DegradationRecipe = Field(
        default_factory=DegradationRecipe, description="for HQ folders; pairs ignore it"
    )
    prompts: str = Field(
        "adapter",
        description="adapter: its own prompt; sidecar: the .txt beside each image; captioner: data.captioner; "
        "else one text for all",
    )
    captioner: str | None = Field(None, description="registered name, or module:Name; with prompts: captioner")
    validation_limit: int | None = Field(None, ge=1, description="the first so many held-out images")
    validation_side: int | None = Field(
        None, ge=1, description="cut larger held-out images to this many HQ pixels a side"
    )
    flip: bool = Field(True, description="mirror crops at random")


class LoraRecipe(Options):
    """The LoRA that is trained."""

    rank: int = Field(4, ge=1)
    alpha: float = Field(
        8.0, gt=0, description="the LoRA is scaled by alpha / rank; the papers' files have 8 at rank 4"
    )
    init: str | None = Field(None, description="start from this LoRA (rewardsr safetensors, or GDPO-SR's .pkl)")


class OptimiserRecipe(Options):
    """AdamW, its learning rate over time, and gradient clipping."""

    learning_rate: float = Field(5e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0)
    eps: float = Field(1e-8, gt=0)
    warmup: int = Field(0, ge=0, description="updates over which the learning rate rises linearly")
    schedule: Literal["constant", "cosine"] = Field(
        "constant", description="after warm-up; cosine falls to 0 at the end"
    )
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class Recipe(Options):
    """A fine-tuning run. Paths are relative to the folder that the command runs in."""

    adapter: str = Field("osediff", description="registered name, or module:Name")
    base: str = Field(description="local diffusers folder, Hub id, or 'embedded' for the pipeline that comes along")
    adapter_options: dict[str, Any] = Field(default_factory=dict)
    trainer: str = Field("gdpo", description="registered name, or module:Name")
    trainer_options: dict[str, Any] = Field(default_factory=dict)
    rewards: list[RewardRecipe] = Field(min_length=1)
    guards: list[str] = Field(["psnr", "ssim"], description="metrics watched at validation that do not steer")
    data: DataRecipe
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    optimiser: OptimiserRecipe = Field(default_factory=OptimiserRecipe)
    output: str = Field(description="folder of the run; must be new or empty, unless resumed")
    steps: int = Field(ge=1)
    batch_size: int = Field(1, ge=1, description="images per process and pass")
    accumulate: int = Field(1, ge=1, description="passes whose gradients make one step")
    updates_per_group: int = Field(1, ge=1, description="optimiser updates on each sampled group, with fresh noise")
    seed: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="of the base; auto: bf16 on CUDA, else fp32")
    gradient_checkpointing: bool = False
    validate_every: int = Field(100, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    max_skipped: int = Field(10, ge=1, description="stop after this many steps in a row that were not finite")
    log_with: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)

    @model_validator(mode="after")
    def _unique_rewards(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError("rewards: a name occurs twice")
        return self


# What a resumed run may change without becoming another run.
FREE_ON_RESUME = {"output", "checkpoint_every", "keep_checkpoints", "log_with", "max_skipped", "device"}


def load_recipe(path: str | None, overrides: dict[str, Any], assignments: list[str]) -> Recipe:
    """The recipe of a run.

    Args:
        path: YAML file; None starts from nothing.
        overrides: top-level or dotted keys with their values; None values are left out.
        assignments: `a.b=c` strings, the value read as YAML; they come last.

    Raises:
        UserError: no such file, not YAML, an unknown key (the nearest is named), a missing or a wrong value.
    """
    content = _read(Path(path)) if path is not None else {}
    for key, value in overrides.items():
        if value is not None:
            _assign(content, key, value)
    for key, value in assignments_of(assignments, "--set").items():
        _assign(content, key, value)
    return parse(Recipe, content, path or "recipe")


def assignments_of(texts: list[str], option: str) -> dict[str, Any]:
    """`key=value` strings of a command-line option; values are read as YAML.

    Raises:
        UserError: one of them is not of that form.
    """
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UserError(f"{option} {text}: expected key=value")
        found[key.strip()] = _yaml(value, f"{option} {text}")
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
    """Top-level keys in which two recipes differ so that they are different runs."""
    left, right = one.model_dump(mode="json"), other.model_dump(mode="json")
    return [key for key in left if key not in FREE_ON_RESUME and left[key] != right[key]]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = _yaml(path.read_text(), f"recipe '{path}'")
    except OSError as error:
        raise UserError(f"recipe '{path}': {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe '{path}' is not a text file") from error
    if not isinstance(content, dict):
        raise UserError(f"recipe '{path}' is not a mapping of keys to values")
    return content


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 5e-5 (no dot) as the number it is meant as, and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.YAMLError(f"the key '{key.value}' occurs twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _assign(content: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"'{dotted}': '{parent}' is a value, not a section")
    content[last] = value
