"""Recipes: everything that determines a run, validated before anything is loaded."""

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)

from rewardsr.errors import UserError, shortened
from rewardsr.options import Count, Options, Seed, parse
from rewardsr.storage import expand, read_text
from rewardsr.train.recipe_text import assign, read_yaml

LARGEST = 100_000  # bytes of a recipe; the longest of ours has 3,000


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
        description="adapter: its own prompt; sidecar: the .txt beside each image; metadata: metadata.jsonl, or the "
        "dataset's column; captioner: data.captioner; else one text for all",
    )
    caption_column: str = Field(
        "text", description="with prompts: metadata; of the texts in metadata.jsonl or in a data set"
    )
    prompt_suffix: str = Field("", description="follows each text after a comma; not with prompts: adapter")
    captioner: str | None = Field(
        None,
        description="with prompts: captioner; image_to_text or image_tags (transformers), another registered name, or "
        "module:Name",
    )
    captioner_options: dict[str, Any] = Field(
        default_factory=dict, description="of the captioner itself (model: Hub id or folder, ...)"
    )

    @model_validator(mode="after")
    def _prompts_fit(self) -> Self:
        if self.prompt_suffix and self.prompts == "adapter":
            raise ValueError("prompt_suffix follows a text, but prompts is 'adapter': set prompts, or no suffix")
        if self.captioner_options and self.captioner is None:
            raise ValueError("captioner_options are set, but captioner is not")
        return self

    def prompted(self, prompts: str | None) -> "ProtocolRecipe":
        """The same with other prompts; None: as they are. What the new ones do not take goes."""
        kept = {name: getattr(self, name) for name in ProtocolRecipe.model_fields}
        if prompts is not None:
            kept["prompts"] = prompts
        if kept["prompts"] != "captioner":
            kept |= {"captioner": None, "captioner_options": {}}
        if kept["prompts"] == "adapter":
            kept["prompt_suffix"] = ""
        return ProtocolRecipe(**kept)


class SourceRecipe(Options):
    """Images from one place: a folder, a list, or a data set of the package `datasets`."""

    path: _Place | None = Field(
        None, description="folder of images, or text file with the path of an HQ image in each line"
    )
    dataset: _Place | None = Field(None, description="instead of a path: id on the Hub, or folder of a data set")
    layout: Literal["auto", "hq", "pairs", "lq"] = Field(
        "auto",
        description="of a path. auto: pairs where there are lq/, lr/ or sr_bicubic/ beside gt/ or hq/; LQ images alone "
        "where there is only the former; else HQ images, those of subfolders too",
    )
    probability: float | None = Field(
        None, gt=0, le=1, description="share of the training samples; null for all sources: by their numbers of images"
    )
    config: str | None = Field(None, description="of a data set: which one, where it has several")
    split: str = Field("train", description="of a data set")
    image_column: str = Field("image", description="of a data set")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("expected one of path and dataset")
        if self.dataset is not None and self.layout == "pairs":
            raise ValueError("layout: a data set holds single images, hq or lq")
        only = ("config", "split", "image_column")
        if self.path is not None and (given := [name for name in only if name in self.model_fields_set]):
            raise ValueError(f"{given[0]} is of a data set, and this is a path")
        return self

    @property
    def place(self) -> str:
        """Where the images are, for messages."""
        return str(self.path or self.dataset)


def _listed(value: Any) -> Any:
    """Sources as users write them: a path, a mapping, or a list of both; None: none."""
    entries = [] if value is None else value if isinstance(value, list | tuple) else [value]
    return [{"path": str(entry)} if isinstance(entry, str | PurePath) else entry for entry in entries]


def _plainly(sources: tuple[SourceRecipe, ...]) -> Any:
    """As in a recipe: the path alone where a source has no settings of its own."""
    entries = [source.model_dump(mode="json", exclude_unset=True) for source in sources]
    plain = [entry["path"] if set(entry) == {"path"} else entry for entry in entries]
    return plain if len(plain) > 1 else plain[0] if plain else None


Sources = Annotated[tuple[SourceRecipe, ...], BeforeValidator(_listed), PlainSerializer(_plainly)]


class DataRecipe(ProtocolRecipe):
    """Where images come from, and how they reach the pipeline."""

    train: Sources = Field(
        min_length=1,
        description="folder of HQ images, of paired lq/ and gt/ matched by name, or of lq/ alone; a list of paths; a "
        "data set; or several of these, as {path or dataset, probability, layout, ...}",
    )
    validation: Sources = Field((), description="the same for held-out images; null: no validation")
    crop: int = Field(512, ge=1, le=16_384, description="side of the HQ crops in pixels")
    too_small: Literal["skip", "pad"] = Field(
        "skip", description="images smaller than the crop are left out and counted, or padded with their mirror image"
    )
    max_unreadable: float = Field(
        0.01, ge=0, le=1, description="share of the images that may be unreadable: they are left out and counted"
    )
    flip: bool = Field(True, description="mirror crops at random")
    caption_from: Literal["lq", "hq"] = Field(
        "lq",
        description="what the captioner sees in training: each LQ crop as the network gets it, or each HQ image once, "
        "as a whole; held-out images are captioned from LQ",
    )
    prompt_dropout: float = Field(0.0, ge=0, le=1, description="share of the training samples with an empty prompt")
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

    @field_validator("train")
    @classmethod
    def _shares_add_up(cls, sources: tuple[SourceRecipe, ...]) -> tuple[SourceRecipe, ...]:
        shares = [source.probability for source in sources if source.probability is not None]
        if shares and (len(shares) < len(sources) or abs(sum(shares) - 1) > 0.01):
            raise ValueError("expected a probability of each source, or of none, and 1 as their sum")
        return sources

    @field_validator("validation")
    @classmethod
    def _no_shares(cls, sources: tuple[SourceRecipe, ...]) -> tuple[SourceRecipe, ...]:
        if any(source.probability is not None for source in sources):
            raise ValueError("every held-out image is seen, so there is no probability")
        return sources

    @model_validator(mode="after")
    def _captions_fit(self) -> Self:
        if self.caption_from == "hq" and self.prompts != "captioner":
            raise ValueError("caption_from is 'hq', but prompts is not 'captioner'")
        return self


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
    adapter_options: dict[str, Any] = Field(default_factory=dict, description="as `rewardsr adapters NAME` lists them")
    trainer: str = Field("gdpo", description="registered name, or module:Name")
    trainer_options: dict[str, Any] = Field(default_factory=dict, description="as `rewardsr trainers NAME` lists them")
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
    seed: Seed = Field(0, description="of everything that is drawn")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: cuda, else mps, else cpu")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="of the base; auto: bf16 where CUDA has it, else fp32"
    )
    gradient_checkpointing: bool = Field(False, description="of networks and autoencoder: less memory, more time")
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
    validate_every: Count = Field(100, description="steps from one scoring of the held-out images to the next")
    checkpoint_every: Count = Field(100, description="steps from one checkpoint to the next")
    keep_checkpoints: Count = Field(2, description="the last so many")
    max_skipped: Count = Field(10, description="stop after this many steps in a row that were not finite")
    log_with: list[Literal["tensorboard", "wandb"]] = Field(
        default_factory=list, description="trackers that get the metrics, beside metrics.jsonl"
    )

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
        found[key.strip()] = read_yaml(value, where)
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

    Where images lie makes none, nor in how many threads they are read. What a source is (its share, its
    layout) is told by the identity of the data.
    """
    left, right = (recipe.model_dump(mode="json") for recipe in (one, other))
    free = {"train": "", "workers": None, "max_unreadable": None}
    for recipe in (left, right):
        recipe["data"] |= free | {"validation": bool(recipe["data"]["validation"])}
    return [key for key in left if key not in FREE_ON_RESUME and left[key] != right[key]]


def _read(path: str) -> dict[str, Any]:
    what = f"recipe '{shortened(path, 100)}'"
    content = read_yaml(read_text(expand(path), what, LARGEST), what)
    if not isinstance(content, dict):
        raise UserError(f"{what} is not a mapping of keys to values")
    return content
