"""The model card of a run: `card.md`, filled with what was trained on what, with which gain, under which licences."""

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.utils import validate_repo_id

from rewardsr import __version__
from rewardsr.ending import Ending, last_validation, read_ending
from rewardsr.errors import UserError
from rewardsr.evaluation.report import Evaluation, markdown
from rewardsr.hub.connection import online
from rewardsr.hub.content import shortened_recipe
from rewardsr.hub.fetch import EMBEDDED, LARGEST_TEXT, PIPELINE, check_lora
from rewardsr.hub.search import TAG
from rewardsr.rewards import licence_of
from rewardsr.run_folder import CARD, LORA, RECIPE, SAMPLES
from rewardsr.storage import expand, read_text
from rewardsr.train.recipe import Recipe, load_recipe, to_yaml

UNKNOWN = "unknown"  # what an adapter says of a licence that it cannot know
HUB_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # how the Hub writes those that it knows
NOT_ON_HUB = ("local", "live", EMBEDDED)  # revisions of bases that came from elsewhere

PAPERS = {"gdpo": ("GDPO-SR", "2603.16769"), "rfsr": ("RFSR", "2412.03268")}

# The sections of card.md by the name that each begins with.
_, *_PARTS = re.split(r"^=== (\w+)\n", Path(__file__).with_name("card.md").read_text(), flags=re.MULTILINE)
SECTIONS = {name: Template(text.strip()) for name, text in zip(_PARTS[::2], _PARTS[1::2], strict=True)}


def build_card(
    run: Path,
    repo: str,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    licence: str | None = None,
    keep_paths: bool = False,
) -> str:
    """README.md of a run for the Hub.

    Args:
        run: folder of a finished run: recipe, LoRA, and validation where there was some.
        repo: "user/name" that it is published as.
        base_model: Hub id of the base; by default the recipe's, where it came from the Hub.
        datasets: Hub ids of what it was trained on.
        licence: of the base; by default what the adapter states of its family's weights, else what the base's own card
            does, where it is here.
        keep_paths: show the recipe's paths as they are, not their last parts alone.

    Returns:
        Front matter and text, which huggingface_hub's `ModelCard` reads.

    Raises:
        UserError: the folder holds no finished run.
    """
    recipe = load_recipe(str(run / RECIPE), {}, [])
    about = check_lora(run / LORA, f"'{run / LORA}'")
    scores, ending = _last_validation(run), read_ending(run)
    revision = about["base"]["revision"]
    if base_model is None and revision not in NOT_ON_HUB:
        base_model = recipe.base
    if licence is None:
        licence = about.get("licence", UNKNOWN)
        if licence == UNKNOWN:
            licence = _licence_of_base(recipe.base, revision)
    if not keep_paths:
        recipe = shortened_recipe(recipe)
    front = _front_matter(recipe, scores, repo, base_model, datasets, licence)
    text = SECTIONS["card"].substitute(
        name=repo.rpartition("/")[2],
        repo=repo,
        adapter=recipe.adapter,
        adapter_options="".join(f", {name}={value!r}" for name, value in recipe.adapter_options.items()),
        base=recipe.base,
        base_name=_base_name(recipe),
        base_revision=revision,
        version=__version__,
        trainer=recipe.trainer,
        results=_results(recipe, scores, run),
        steps=recipe.steps if ending is None else ending.shipped,
        stopped=_stopped(recipe, ending),
        batch_size=recipe.batch_size * recipe.accumulate,
        crop=recipe.data.crop,
        learning_rate=f"{recipe.optimiser.learning_rate:g}",
        rank=about["rank"],
        alpha=f"{float(about['alpha']):g}",
        seed=recipe.seed,
        rewards="\n".join(f"| `{kept.name}` | {kept.weight:g} | {licence_of(kept.name)} |" for kept in recipe.rewards)
        or "| none: trained towards HQ images | | |",
        elsewhere=SECTIONS.get(recipe.adapter, SECTIONS["diffusers"]).substitute(repo=repo, file=LORA),
        licence=licence or "not stated where it was loaded from",
        citation=_citation(recipe.trainer),
        paths="" if keep_paths else "Of paths on the disk that it was trained on, the last part is told.\n\n",
        recipe=to_yaml(recipe),
    )
    return f"---\n{front.to_yaml()}\n---\n\n{text}"


def check_card(text: str, files: Collection[str]) -> None:
    """Refuse a card that the Hub would, or that would not be found.

    Args:
        text: of README.md.
        files: names of the other files in the repository; pictures must be among them.

    Raises:
        UserError: no front matter or none that parses, a base that cannot be one, no tag to be found by, or a picture
            that would not be there.
    """
    if not text.lstrip().startswith("---"):
        raise UserError(f"the card ({CARD}) has no front matter: it begins with a block of YAML between --- lines")
    try:
        data: Any = ModelCard(text).data
        bases = data.base_model or []
        for base in [bases] if isinstance(bases, str) else bases:
            validate_repo_id(base)
        tags = data.tags if isinstance(data.tags, list) else []
        if not isinstance(data.license, str | None):
            raise ValueError("license is not one name")
    except Exception as error:  # YAML's, the Hub's client's, or Python's from inside it
        raise UserError(f"the card ({CARD}) is invalid: {' '.join(str(error).split())}") from error
    if TAG not in tags:
        raise UserError(f"the card ({CARD}) lacks the tag '{TAG}', by which adapters are found")
    for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text):
        if "://" not in picture and picture not in files:
            raise UserError(f"the card ({CARD}) shows '{picture}', which would not be in the repository")


def _front_matter(
    recipe: Recipe,
    scores: Evaluation | None,
    repo: str,
    base_model: str | None,
    datasets: Sequence[str],
    licence: str | None,
) -> ModelCardData:
    """What the Hub's search reads."""
    data: dict[str, Any] = {"license": "other"}
    if licence is None:
        data["license_name"] = "that-of-the-base-model"
    elif HUB_LICENCE.fullmatch(licence):
        data["license"] = licence
    else:
        data["license_name"] = re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")  # the Hub wants an id
    if base_model is not None:
        data |= {"base_model": base_model, "base_model_relation": "adapter"}
    if scores is not None:
        held_out = ", ".join(Path(source.place).name for source in recipe.data.validation) or "held-out"
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
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        tags=[TAG, "super-resolution", "image-super-resolution", "lora", "diffusers", recipe.adapter, recipe.trainer],
        datasets=list(datasets) or None,
        **data,
    )


def _licence_of_base(base: str, revision: str) -> str | None:
    """The licence that the base's own card states; None where it has no card here, or none that states one."""
    try:
        if revision in NOT_ON_HUB:
            path = (PIPELINE if base == EMBEDDED else expand(base)) / CARD
        else:
            path = Path(hf_hub_download(base, CARD, revision=revision, local_files_only=not online()))
        read_text(path, "the base's card")  # of a sensible size, or nothing is stated
        stated = (metadata_load(path) or {}).get("license")
    except Exception:  # no file, no connection, not YAML: nothing is stated in all of these
        return None
    return stated if isinstance(stated, str) else None


def _base_name(recipe: Recipe) -> str:
    name = "the small pipeline that comes with rewardsr" if recipe.base == EMBEDDED else f"`{recipe.base}`"
    weights = recipe.adapter_options.get("weights")
    return f"{name} with `{weights}` merged in" if weights else name


def _results(recipe: Recipe, scores: Evaluation | None, run: Path) -> str:
    if scores is None:
        return SECTIONS["unmeasured"].template
    steering = [entry.name for entry in recipe.rewards if entry.weight > 0]
    watched = [name for name in scores.rewards if name not in steering]
    pictured = last_validation(run, ".png") is not None
    return SECTIONS["measured"].substitute(
        images=len(scores.images),
        steering=", ".join(f"`{name}`" for name in steering) or "HQ images alone",
        watched=", ".join(f"`{name}`" for name in watched) or "nothing",
        table=markdown(scores),
        picture=f"![LQ enlarged, base, tuned and HQ]({SAMPLES}/validation.png)" if pictured else "",
    )


def _stopped(recipe: Recipe, ending: Ending | None) -> str:
    """That the guards ended the run, and why; nothing where they did not."""
    if ending is None or ending.stopped is None:
        return ""
    return "\n\n" + SECTIONS["stopped"].substitute(
        step=ending.step, steps=recipe.steps, shipped=ending.shipped, why=ending.stopped, rule=ending.rule
    )


def _citation(trainer: str) -> str:
    if trainer not in PAPERS:
        return ""
    title, number = PAPERS[trainer]
    return SECTIONS["citation"].substitute(key=title.lower().replace("-", ""), title=title, number=number)


def _last_validation(run: Path) -> Evaluation | None:
    newest = last_validation(run, ".json")
    if newest is None:
        return None
    try:
        return Evaluation.from_dict(json.loads(read_text(newest, f"'{newest}'", LARGEST_TEXT)))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"'{newest}' is damaged: {error}") from error
