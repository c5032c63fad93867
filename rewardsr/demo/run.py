"""`rewardsr demo`: the main job, small enough for a CPU and real in every part."""

import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

from torch import Tensor

from rewardsr import lora, run_folder
from rewardsr.adapter import ISRAdapter
from rewardsr.data.images import list_images, read_image
from rewardsr.data.protocol import open_images
from rewardsr.demo.photos import SOFT, write_folders
from rewardsr.draws import Draws
from rewardsr.errors import UserError
from rewardsr.evaluation.offset import latent_offset
from rewardsr.evaluation.page import EvaluationView, Page, Picture, write_page
from rewardsr.evaluation.page.read import read_run
from rewardsr.evaluation.pictures import Cell, closeup, encode_webp, write_grid
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.evaluation.report import Evaluation, side_by_side
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.pipelines import load_adapter
from rewardsr.rewards import build
from rewardsr.storage import expand, write_text
from rewardsr.train.finetune import finetune
from rewardsr.train.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

RECIPES = {name: Path(__file__).parent / f"{name}.yaml" for name in ("gdpo", "rfsr")}
SHUFFLED = "gdpo-shuffled"
DRAWS = 1  # noise draws that each score averages
TARGET = "detail_correlation"
# What the demo promises of the metrics that must hold, and checks: 0.1 dB, 0.005, 0.0075, and 2.5 levels of 255.
GUARDS = {"psnr": -0.1, "ssim": -0.005, "structure": -0.0075, "lq_consistency": -0.01}
METRICS = (TARGET, *GUARDS, "detail")
OFFSET_IMAGES, OFFSET_SIDE = 4, 256  # training photographs that the constant offset is measured on, and their pixels
UPSCALED = 4  # photographs that a fresh process upscales as well
CLOSEUP, ZOOM = 84, 3  # pixels a side of what the picture shows of each photograph, and how much larger


def run_demo(output: Path, steps: int | None = None) -> None:
    """Tune the embedded pipeline with GDPO, a shuffled control and RFSR, compare them, and use what came out.

    Args:
        output: new or empty folder for everything.
        steps: instead of the recipes'.

    Raises:
        UserError: the folder is not empty.
    """
    output = expand(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"'{output}' is not empty: remove it, or choose another folder with --output")
    began = time.perf_counter()
    photos = output / "photos"
    write_folders(photos, SOFT)
    recipes = {name: demo_recipe(name, photos, output / name, steps) for name in RECIPES}
    options = {**recipes["gdpo"].trainer_options, "shuffle_advantages": True}
    recipes[SHUFFLED] = recipes["gdpo"].model_copy(
        update={"trainer_options": options, "output": str(output / SHUFFLED)}
    )
    for name, recipe in recipes.items():
        if name in RECIPES:
            logger.info(f"recipe of {name}:\n" + indent(RECIPES[name].read_text(), "  "))
        else:
            logger.info("control: gdpo again, with the advantages dealt out at random ...")
        finetune(recipe)

    logger.info("comparing all of them on held-out photographs ...")
    found, rows = compare(recipes, photos / "val")
    write_grid([closeup(row, CLOSEUP, ZOOM) for row in rows], output / "closeups.png")
    for name, table in found.items():
        write_text(output / f"{name}.json", table.to_json())
    write_page(output / run_folder.REPORT, page_of(found, rows, output))
    logger.info("\nchange against the base [95 % interval over photographs]:")
    for name in RECIPES:
        control = found[SHUFFLED] if name == "gdpo" else None
        logger.info(f"\n{name}\n{indent(table_of(found[name], control), '  ')}\n{verdict(found[name], control)}")
    files = list_images(photos / "val" / "lq")[:UPSCALED]
    _in_a_fresh_process(output / "rfsr", files, output / "upscaled", _in_this_process(recipes["rfsr"], files))
    logger.info(f"done in {time.perf_counter() - began:.0f} s\n")
    logger.info(_where(output))


def demo_recipe(name: str, photos: Path, run: Path, steps: int | None = None) -> Recipe:
    """One of the demo's recipes for these folders."""
    overrides: dict[str, Any] = {
        "data.train": str(photos / "train"),
        "output": str(run),
        "steps": steps,
    }
    return load_recipe(str(RECIPES[name]), overrides, [])


def compare(recipes: Mapping[str, Recipe], pairs: Path) -> tuple[dict[str, Evaluation], list[list[Cell]]]:
    """Base against the LoRA of each run on the held-out photographs, as scores and as pictures.

    But for the control, each is compared with its own constant offset, which is measured on training photographs.
    """
    first = next(iter(recipes.values()))
    adapter = load_adapter(first.adapter, first.base, **first.adapter_options)
    training = open_images(first.data, first.data.train, adapter.scale)
    images = partial(open_images(first.data, str(pairs), adapter.scale).validation, None, 0, None)
    rewards = {name: build(name) for name in METRICS}
    count = len(list_images(pairs / "lq"))
    held_out = HeldOut(
        adapter, images, rewards, count=count, seed=1, draws_per_image=DRAWS, picture_side=None, pictures=count
    )
    found: dict[str, Evaluation] = {}
    rows: list[list[Cell]] = []
    for name, recipe in recipes.items():
        lora.load(adapter, Path(recipe.output))
        offset = None
        if name != SHUFFLED:
            sample = training.validation(OFFSET_IMAGES, side=OFFSET_SIDE)
            offset = latent_offset(adapter, sample, f"{OFFSET_IMAGES} training photographs", count=OFFSET_IMAGES)
        found[name] = replace(held_out.score(offset=offset), margins={key: -least for key, least in GUARDS.items()})
        if name != SHUFFLED:
            rows = _beside(rows, held_out.rows, name)
    return found, rows


def _beside(rows: list[list[Cell]], more: list[list[Cell]], name: str) -> list[list[Cell]]:
    """Rows LQ | base | ... | HQ with one more run in them."""
    rows = rows or [[*row[:2], row[-1]] for row in more]
    return [[*row[:-1], (name, of[2][1]), row[-1]] for row, of in zip(rows, more, strict=True)]


def page_of(found: Mapping[str, Evaluation], rows: Sequence[list[Cell]], output: Path) -> Page:
    """Curves, evaluations and photographs of the demo's runs as one page."""
    labels = ("LQ", "base", *RECIPES, "HQ")
    pictures = []
    for place, (name, row) in enumerate(zip(found["gdpo"].images, rows, strict=True)):
        images = {label: encode_webp(image) for label, (_, image) in zip(labels, row, strict=True)}
        scores = {run: {key: pair.tuned[place] for key, pair in found[run].rewards.items()} for run in RECIPES}
        scores["base"] = {key: pair.base[place] for key, pair in found["gdpo"].rewards.items()}
        pictures.append(Picture(name, images, scores))
    runs = [read_run(output / name, name) for name in found]
    views = [EvaluationView(name, one.to_dict()) for name, one in found.items()]
    return Page("rewardsr demo: a soft lens", runs, views, pictures)


def table_of(found: Evaluation, control: Evaluation | None) -> str:
    """A run, its constant offset, what it gives without that, and its shuffled control side by side."""
    assert found.cast is not None
    tests = found.cast.rewards
    columns = {
        "tuned": found.rewards,
        "offset alone": {name: test.alone for name, test in tests.items()},
        "without it": {name: test.without for name, test in tests.items()},
    }
    return side_by_side(found, columns if control is None else columns | {"shuffled": control.rewards})


def verdict(found: Evaluation, control: Evaluation | None) -> str:
    """What the table says, in words; nothing is claimed that it does not show."""
    assert found.cast is not None
    gain, test = found.rewards[TARGET], found.cast.rewards[TARGET]
    half = gain.difference / 2
    said = {"a gain: its interval is above 0": gain.low > 0}
    if control is not None:
        said["beyond the drift of the shuffled control"] = gain.low > abs(control.rewards[TARGET].difference)
    said["a constant offset of the latents alone gives less than half"] = test.alone.difference < half
    said["without that offset more than half is left"] = test.without.difference > half
    for name, floor in GUARDS.items():
        change = found.rewards[name].difference
        said[f"guard {name}: {change:+.4f}, may fall by {-floor:g}"] = change >= floor
    lines = [
        f"{TARGET}: {gain.difference:+.4f}",
        *(f"{text}: {'yes' if holds else 'NO'}" for text, holds in said.items()),
    ]
    return "\n".join(lines)


def _in_this_process(recipe: Recipe, files: Sequence[Path]) -> list[Tensor]:
    """What `upscale` gives for these LQ photographs."""
    adapter: ISRAdapter = load_adapter(recipe.adapter, recipe.base, **recipe.adapter_options)
    lora.load(adapter, Path(recipe.output))
    return [
        upscale_tensor(adapter, read_image(file)[None], generator=Draws(0, 0, [index], "upscale"))[0]
        for index, file in enumerate(files)
    ]


def _in_a_fresh_process(run: Path, files: Sequence[Path], output: Path, expected: list[Tensor]) -> None:
    """Run the command that a user would, and compare its pictures with this process's."""
    command = ["upscale", *map(str, files), "--run", str(run), "--output", str(output), "--device", "cpu"]
    logger.info("\nin a fresh process: rewardsr " + " ".join(command))
    subprocess.run([sys.executable, "-m", "rewardsr", *command], check=True)
    written = [read_image(path) for path in sorted(output.glob("*.png"))]
    worst = max(float((a - b).abs().max()) for a, b in zip(written, expected, strict=True))
    logger.info(f"largest difference to this process: {worst * 255:.2f} of 255 (8-bit rounding is 0.5)")
    if worst > 0.51 / 255:
        raise RuntimeError("the reloaded LoRA gives other pictures than the one that was evaluated")


def _where(output: Path) -> str:
    return f"""\
  look at this first     {output / run_folder.REPORT} (in a browser: verdict, sliders, curves, every photograph)
  the same in one look   {output / "closeups.png"} (LQ | base | gdpo | rfsr | HQ, {ZOOM} times enlarged)
  LoRAs                  {output / "gdpo" / run_folder.LORA}, {output / "rfsr" / run_folder.LORA}
  metrics of every step  {output / "rfsr" / run_folder.METRICS}
  tables, per image      {output / "gdpo.json"}, {output / "rfsr.json"}
  upscaled photographs   {output / "upscaled"}

your own pipeline and photographs:
  rewardsr finetune --base FOLDER_OR_ID --option noise_t=250 --rewards psnr=0.5,musiq=0.5 \\
    --data YOUR_HQ_FOLDER --validation HELD_OUT_FOLDER --steps 1000 --output runs/first"""
