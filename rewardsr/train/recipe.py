"""Recipes: everything that determines a run, validated before anything is loaded."""

from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator, model_validator

from rewardsr.errors import UserError, shortened
from rewardsr.options import Count, Options, Seed, parse
from rewardsr.storage import expand, read_text
from rewardsr.train.recipe_guards import PANEL, PANEL_OF, GuardRecipe, Guards, StopRecipe
from rewardsr.train.recipe_learning import LoraRecipe, OptimiserRecipe
from rewardsr.train.recipe_text import Place, assign, read_yaml

LARGEST = 100_000  # bytes of a recipe; the longest of ours has 3,000


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

    path: Place | None = Field(
        None, description="folder of images, or text file with the path of an HQ image in each line"
    )
    dataset: Place | None = Field(None, description="instead of a path: id on the Hub, or folder of a data set")
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


class Recipe(Options):
    """A fine-tuning run. Paths are relative to the folder that the command runs in."""

    adapter: str = Field("osediff", description="registered name, or module:Name")
    base: Place = Field(description="local diffusers folder, Hub id, or 'embedded' for the pipeline that comes along")
    adapter_options: dict[str, Any] = Field(default_factory=dict, description="as `rewardsr adapters NAME` lists them")
    trainer: str = Field("gdpo", description="registered name, or module:Name")
    trainer_options: dict[str, Any] = Field(default_factory=dict, description="as `rewardsr trainers NAME` lists them")
    rewards: list[RewardRecipe] = Field(
        default_factory=list, description="what steers the trainer; a supervised one has none that weigh more than 0"
    )
    guards: Guards = Field(
        (GuardRecipe(name=PANEL),),
        description="metrics watched on held-out images that do not steer, each a name or {name, margin}. panel: "
        f"{', '.join(PANEL_OF[True])}; without HQ images {', '.join(PANEL_OF[False])}. []: none",
    )
    stop_when: StopRecipe | None = Field(
        None, description="end the run when a guard falls while the rewards rise ({}: by the defaults); null: only warn"
    )
    keep_best: bool = Field(
        False,
        description="keep the checkpoint of the largest gain at which no guard was beyond its margin, beside the last "
        "ones; with stop_when always",
    )
    cast_test: bool = Field(
        False,
        description="at the end, tell how much of each gain one constant offset of the latents gives; takes about "
        "three validations",
    )
    data: DataRecipe
    lora: LoraRecipe = Field(default_factory=LoraRecipe)
    optimiser: OptimiserRecipe = Field(default_factory=OptimiserRecipe)
    output: Place = Field(description="folder of the run; must be new or empty, unless resumed")
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
    run_name: str | None = Field(None, pattern=r"^\w[\w.-]*$", description="in trackers; null: output's")

    @model_validator(mode="after")
    def _unique_names(self) -> Self:
        names = [reward.name for reward in self.rewards]
        if len(set(names)) < len(names):
            raise ValueError("rewards: a name occurs twice")
        names = [guard.name for guard in self.guards]
        if len(set(names)) < len(names):
            raise ValueError("guards: a name occurs twice")
        return self

    @model_validator(mode="after")
    def _held_out_where_needed(self) -> Self:
        asked = {"stop_when": self.stop_when is not None, "keep_best": self.keep_best, "cast_test": self.cast_test}
        if needing := [name for name, on in asked.items() if on]:
            if not self.data.validation:
                raise ValueError(f"{needing[0]} looks at held-out images: give data.validation")
            if needing[0] != "cast_test" and not any(reward.weight > 0 for reward in self.rewards):
                raise ValueError(f"{needing[0]} compares guards with rewards that steer, and there are none")
        return self

    @property
    def keeps_best(self) -> bool:
        """Whether the best checkpoint stays."""
        return self.keep_best or self.stop_when is not None


# What a resumed run may change without becoming another run.
FREE_ON_RESUME = {
    *("output", "steps", "checkpoint_every", "keep_checkpoints", "keep_best", "stop_when", "log_with", "run_name"),
    *("max_skipped", "cast_test", "device"),
}


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
