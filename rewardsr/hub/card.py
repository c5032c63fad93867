"""The model card of a run: what was trained on what, with which gain, how to load it, whose licences apply."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rewardsr import __version__
from rewardsr.errors import UserError
from rewardsr.evaluation.report import Evaluation, markdown
from rewardsr.hub.fetch import card_of
from rewardsr.lora.file import OUR_HEADER
from rewardsr.rewards import licence_of
from rewardsr.run_folder import LORA
from rewardsr.train.recipe import Recipe, load_recipe, to_yaml
from rewardsr.weights import read_safetensors

PICTURE = "samples/validation.png"
TAGS = ("rewardsr", "super-resolution", "image-super-resolution", "lora", "diffusers")
UNKNOWN = "unknown"  # what an adapter says of a licence that it cannot know
HUB_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # how the Hub writes those that it knows
NOT_ON_HUB = ("local", "live", "embedded")  # revisions of bases that came from elsewhere
EMBEDDED = "the small pipeline that comes with rewardsr"

PAPERS = {
    "gdpo": ("GDPO-SR", "2603.16769"),
    "rfsr": ("RFSR", "2412.03268"),
}


def build_card(
    run: Path, repo: str, base_model: str | None = None, datasets: Sequence[str] = (), licence: str | None = None
) -> str:
    """README.md of a run for the Hub.

    Args:
        run: folder of a finished run: recipe, LoRA, and validation where there was some.
        repo: "user/name" that it is published as.
        base_model: Hub id of the base; by default the recipe's, where it came from the Hub.
        datasets: Hub ids of what it was trained on.
        licence: of the base; by default what the adapter states of its family's weights, else what the base's own card
            does, where it is here.

    Returns:
        Front matter and text, which huggingface_hub's `ModelCard` reads.

    Raises:
        UserError: the folder holds no finished run.
    """
    recipe = load_recipe(str(run / "recipe.yaml"), {}, [])
    header = read_safetensors(run / LORA)[1]
    try:
        about: dict[str, Any] = json.loads(header[OUR_HEADER])
        base, rank, alpha = about["base"], int(about["rank"]), float(about["alpha"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"'{run / LORA}' has a damaged header: {error}") from error
    scores = _last_validation(run)
    on_hub = base["revision"] not in NOT_ON_HUB
    base_model = recipe.base if base_model is None and on_hub else base_model
    if licence is None:
        licence = about.get("licence", UNKNOWN)
        if licence == UNKNOWN:
            licence = _licence(recipe.base, base["revision"] if on_hub else None)
    front = _front_matter(recipe, scores, repo, base_model, datasets, licence)
    body = [
        f"# {repo.rpartition('/')[2]}\n",
        _about(recipe, base),
        _results(recipe, scores, run),
        _training(recipe, rank, alpha),
        _use(recipe, repo),
        _licences(licence),
        _citation(recipe),
        f"## Exact recipe\n\n```yaml\n{to_yaml(recipe)}```\n",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(body)


def _front_matter(
    recipe: Recipe,
    scores: Evaluation | None,
    repo: str,
    base_model: str | None,
    datasets: Sequence[str],
    licence: str | None,
) -> dict[str, Any]:
    """What the Hub's search reads, made by its own card classes."""
    from huggingface_hub import EvalResult, ModelCardData

    data: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": [*TAGS, recipe.adapter, recipe.trainer],
        "license": "other",
    }
    if licence is None:
        data["license_name"] = "that-of-the-base-model"
    elif HUB_LICENCE.fullmatch(licence):
        data["license"] = licence
    else:
        data["license_name"] = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")  # the Hub wants an id
    if base_model is not None:
        data |= {"base_model": base_model, "base_model_relation": "adapter"}
    if datasets:
        data["datasets"] = list(datasets)
    if scores is not None:
        held_out = Path(recipe.data.validation or "held-out").name
        data |= {"model_name": repo.rpartition("/")[2], "metrics": list(scores.rewards)}
        data["eval_results"] = [
            EvalResult(
                task_type="image-to-image",
                task_name="Image super-resolution",
                dataset_type=held_out,
                dataset_name=held_out,
                metric_type=name,
                metric_value=round(comparison.tuned_mean, 6),
            )
            for name, comparison in scores.rewards.items()
        ]
    made: dict[str, Any] = ModelCardData(**data).to_dict()
    return made


def _licence(base: str, revision: str | None) -> str | None:
    """The licence that the base's own card states, carried over; None where it has no card here."""
    card = card_of(base, revision)
    if card is None:
        return None
    parts = card.split("---", 2)
    try:
        front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    stated = front.get("license") if isinstance(front, dict) else None
    return stated if isinstance(stated, str) else None


def _about(recipe: Recipe, base: dict[str, str]) -> str:
    name = EMBEDDED if recipe.base == "embedded" else f"`{recipe.base}`"
    weights = recipe.adapter_options.get("weights")
    more = f" with `{weights}` merged in" if weights else ""
    return (
        f"A LoRA for the image super-resolution pipeline `{recipe.adapter}` on {name}{more}, fine-tuned with "
        f"image-quality rewards by rewardsr {__version__} (trainer `{recipe.trainer}`).\n\n"
        f"It belongs to these base weights (revision `{base['revision']}`) and is refused on others.\n"
    )


def _results(recipe: Recipe, scores: Evaluation | None, run: Path) -> str:
    lines = ["## What it changes\n"]
    if scores is None:
        lines.append("There were no held-out images in this run: nothing was measured.\n")
        return "\n".join(lines)
    steering = ", ".join(f"`{entry.name}`" for entry in recipe.rewards if entry.weight > 0)
    watched = ", ".join(
        f"`{name}`" for name in scores.rewards if name not in {e.name for e in recipe.rewards if e.weight}
    )
    lines.append(
        f"Scores of base and tuned pipeline on {len(scores.images)} held-out images, from the same noise; intervals "
        f"are 95 % bootstrap intervals of the mean difference, by image. Trained on: {steering}. "
        f"Only watched: {watched or 'nothing'}.\n"
    )
    lines.append(markdown(scores))
    if any((run / "validation").glob("*.png")):
        lines.append(f"![LQ enlarged, base, tuned and HQ]({PICTURE})\n")
    return "\n".join(lines)


def _training(recipe: Recipe, rank: int, alpha: float) -> str:
    rewards = "\n".join(f"| `{entry.name}` | {entry.weight:g} | {licence_of(entry.name)} |" for entry in recipe.rewards)
    return (
        f"## Training\n\n{recipe.steps} steps of {recipe.batch_size * recipe.accumulate} images a process, crops of "
        f"{recipe.data.crop} pixels, learning rate {recipe.optimiser.learning_rate:g}, LoRA of rank {rank}, alpha "
        f"{alpha:g}, seed {recipe.seed}.\n\n| reward | weight | licence |\n|---|---|---|\n{rewards}\n"
    )


def _use(recipe: Recipe, repo: str) -> str:
    options = "".join(f", {name}={value!r}" for name, value in recipe.adapter_options.items())
    text = (
        "## How to load it\n\nIn rewardsr:\n\n```python\nimport rewardsr\n\n"
        f'adapter = rewardsr.load_adapter("{recipe.adapter}", "{recipe.base}"{options})\n'
        f'rewardsr.load_lora(adapter, "{repo}", scale=1.0)\n'
        'rewardsr.upscale(adapter, ["photo.png"], "out")\n```\n'
    )
    if recipe.adapter == "stablesr":
        return text + "\nDiffusers has no pipeline for StableSR: its UNet needs the features of StableSR's encoder.\n"
    text += "\nor into a pipeline in memory, whose networks are shared: `adapter = rewardsr.wrap(pipe)`.\n"
    if recipe.adapter == "seesr":
        return text + (
            f"\nIn plain diffusers, export it first (`rewardsr export out --run {repo} --format diffusers`): UNet and "
            "ControlNet each have a file of their own, which `rewardsr.lora.exchange.load_component` loads.\n"
        )
    return text + (
        "\nIn plain diffusers, on a pipeline with the same base weights:\n\n```python\n"
        f'pipe.load_lora_weights("{repo}", weight_name="{LORA}")\n```\n\n'
        f"In ComfyUI: `rewardsr export comfy --run {repo} --format kohya` writes `comfy/lora.safetensors`, for "
        "`models/loras`.\n"
    )


def _licences(licence: str | None) -> str:
    return (
        "## Licences\n\nThe LoRA is derived from its base and falls under the base's licence: "
        f"{licence or 'not stated where it was loaded from'}. Rewards have "
        "licences of their own, listed above.\n"
    )


def _citation(recipe: Recipe) -> str:
    if recipe.trainer not in PAPERS:
        return ""
    name, number = PAPERS[recipe.trainer]
    key = name.lower().replace("-", "")
    return (
        f"## Citation\n\n```bibtex\n@misc{{{key},\n  title = {{{name}}},\n  eprint = {{{number}}},\n"
        f"  archivePrefix = {{arXiv}},\n  url = {{https://arxiv.org/abs/{number}}}\n}}\n```\n"
    )


def _last_validation(run: Path) -> Evaluation | None:
    found = sorted((run / "validation").glob("step-*.json"))
    if not found:
        return None
    try:
        return Evaluation.from_dict(json.loads(found[-1].read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{found[-1]}' is damaged: {error}") from error
