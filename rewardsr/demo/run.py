"""`rewardsr demo`: the main job, small enough for a CPU and real in every part."""

import logging
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

from torch import Tensor

from rewardsr import lora, run_folder
from rewardsr.adapter import ISRAdapter
from rewardsr.data.images import list_images, read_image
from rewardsr.data.protocol import open_images
from rewardsr.demo.photos import write_folders
from rewardsr.draws import Draws
from rewardsr.errors import UserError
from rewardsr.evaluation.offset import latent_offset
from rewardsr.evaluation.pictures import Cell, write_grid
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.evaluation.report import Evaluation, side_by_side
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.pipelines import load_adapter
from rewardsr.rewards import build
from rewardsr.storage import expand, write_text
from rewardsr.train.finetune import finetune
from rewardsr.train.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

RECIPE = Path(__file__).parent / "recipe.yaml"
DRAWS = 4  # noise draws that each score averages
# What the demo promises of the metrics that must hold, and checks: 0.1 dB, 0.005, and a tenth of the base's distances.
GUARDS = {"psnr": -0.1, "ssim": -0.005, "structure": -0.0075, "lq_consistency": -0.0012}
TARGET = "detail"
OFFSET_SIDE = 256  # pixels of each training photograph that the constant offset is measured on
METRICS = (TARGET, *GUARDS, "sharpness")


def run_demo(output: Path, steps: int | None = None) -> None:
    """Fine-tune the embedded pipeline and a shuffled control, compare them and a constant offset, and use the LoRA.

    Args:
        output: new or empty folder for everything.
        steps: instead of the recipe's.

    Raises:
        UserError: the folder is not empty.
    """
    output = expand(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"'{output}' is not empty: remove it, or choose another folder with --output")
    began = time.perf_counter()
    photos, tuned, control = output / "photos", output / "run", output / "control"
    write_folders(photos)
    recipe = demo_recipe(photos, tuned, steps)
    logger.info("recipe:\n" + indent(RECIPE.read_text(), "  "))
    logger.info(f"fine-tuning on {photos / 'train'} ...")
    finetune(recipe)
    logger.info("control: the same, with the advantages dealt out at random ...")
    finetune(_shuffled(recipe, control))

    found, rows = compare(recipe, tuned, cast=True)
    dealt, _ = compare(recipe, control)
    write_grid(rows, output / "before_after.png")
    for name, table in {"tuned": found, "shuffled": dealt}.items():
        write_text(output / f"{name}.json", table.to_json())
    logger.info(
        "\nheld-out photographs, change against the base [95 % interval]:\n" + indent(table_of(found, dealt), "  ")
    )
    logger.info(verdict(found, dealt))
    _in_a_fresh_process(tuned, photos, output / "upscaled", _in_this_process(recipe, tuned, photos))
    logger.info(f"done in {time.perf_counter() - began:.0f} s\n")
    logger.info(_where(output))


def demo_recipe(photos: Path, run: Path, steps: int | None) -> Recipe:
    """The demo's recipe for these folders."""
    overrides: dict[str, Any] = {
        "data.train": str(photos / "train"),
        "data.validation": str(photos / "val"),
        "output": str(run),
        "steps": steps,
    }
    return load_recipe(str(RECIPE), overrides, [])


def compare(recipe: Recipe, run: Path, cast: bool = False) -> tuple[Evaluation, list[list[Cell]]]:
    """Base against the LoRA of a run on the held-out photographs, as scores and as pictures.

    The offset of the cast test is measured on the training photographs.
    """
    adapter = _tuned(recipe, run)
    offset = None
    if cast:
        training = open_images(recipe.data, recipe.data.train, adapter.scale)
        offset = latent_offset(adapter, training.validation(side=OFFSET_SIDE), "the training photographs")
    images = partial(open_images(recipe.data, recipe.data.validation, adapter.scale).validation, None, 0, None)
    rewards = {name: build(name) for name in METRICS}
    held_out = HeldOut(adapter, images, rewards, seed=1, draws_per_image=DRAWS, picture_side=None)
    return held_out.score(offset=offset), held_out.rows


def table_of(found: Evaluation, control: Evaluation) -> str:
    """The run, its shuffled control and its constant offset side by side."""
    assert found.cast is not None
    alone = {name: test.alone for name, test in found.cast.rewards.items()}
    return side_by_side(found, {"tuned": found.rewards, "shuffled": control.rewards, "constant offset": alone})


def verdict(found: Evaluation, control: Evaluation) -> str:
    """What the table says, in words; nothing is claimed that it does not show."""
    assert found.cast is not None
    gain, drift, test = found.rewards[TARGET], control.rewards[TARGET], found.cast.rewards[TARGET]
    beyond = gain.low > max(0.0, abs(drift.difference), abs(drift.low), abs(drift.high))
    lines = [
        f"{TARGET}: {gain.difference:+.4f}",
        f"beyond the drift of the shuffled control: {'yes' if beyond else 'NO'}",
        f"beyond a constant offset, one number a channel of the latents and the same for every image: "
        f"{'yes' if test.beyond.low > 0 else 'NO'}; what it gives more is in "
        f"[{test.beyond.low:+.4f}, {test.beyond.high:+.4f}]",
        found.cast.sentence(TARGET),
    ]
    for name, floor in GUARDS.items():
        change = found.rewards[name].difference
        lines.append(
            f"guard {name}: {change:+.4f}, may fall by {-floor:g}: {'held' if change >= floor else 'NOT HELD'}"
        )
    return "\n".join(lines)


def _tuned(recipe: Recipe, run: Path) -> ISRAdapter:
    adapter = load_adapter(recipe.adapter, recipe.base, **recipe.adapter_options)
    lora.load(adapter, run)
    return adapter


def _shuffled(recipe: Recipe, run: Path) -> Recipe:
    options = {**recipe.trainer_options, "shuffle_advantages": True}
    return recipe.model_copy(update={"trainer_options": options, "output": str(run)})


def _in_this_process(recipe: Recipe, run: Path, photos: Path) -> list[Tensor]:
    """What `upscale` gives for the held-out LQ photographs."""
    adapter = _tuned(recipe, run)
    return [
        upscale_tensor(adapter, read_image(file)[None], generator=Draws(0, 0, [index], "upscale"))[0]
        for index, file in enumerate(list_images(photos / "val" / "lq"))
    ]


def _in_a_fresh_process(run: Path, photos: Path, output: Path, expected: list[Tensor]) -> None:
    """Run the command that a user would, and compare its pictures with this process's."""
    command = ["upscale", str(photos / "val" / "lq"), "--run", str(run), "--output", str(output), "--device", "cpu"]
    logger.info("in a fresh process: rewardsr " + " ".join(command))
    subprocess.run([sys.executable, "-m", "rewardsr", *command], check=True)
    written = [read_image(path) for path in sorted(output.glob("*.png"))]
    worst = max(float((a - b).abs().max()) for a, b in zip(written, expected, strict=True))
    logger.info(f"largest difference to this process: {worst * 255:.2f} of 255 (8-bit rounding is 0.5)")
    if worst > 0.51 / 255:
        raise RuntimeError("the reloaded LoRA gives other pictures than the one that was evaluated")


def _where(output: Path) -> str:
    return f"""\
  before/after picture   {output / "before_after.png"}
  LoRA                   {output / "run" / run_folder.LORA}
  metrics of every step  {output / "run" / run_folder.METRICS}
  tables, per image      {output / "tuned.json"}
  upscaled photographs   {output / "upscaled"}

your own pipeline and photographs:
  rewardsr finetune --base FOLDER_OR_ID --set adapter_options.noise_t=250 --rewards psnr=0.5,musiq=0.5 \\
    --data YOUR_HQ_FOLDER --validation HELD_OUT_FOLDER --steps 1000 --output runs/first"""
