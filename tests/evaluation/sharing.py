"""Scores three images in the processes of a launch; `torchrun sharing.py BASE FOLDER`, with a LoRA in FOLDER/lora.

Each process leaves FOLDER/<rank>.json: the scores, how often it scored, and the errors that failures gave.
"""

import json
import math
import sys
from pathlib import Path

import torch
from test_protocol import Broken, Drawing, Images

from rewardsr import load_adapter, lora
from rewardsr.errors import UserError
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.rewards.fidelity import PSNR
from rewardsr.train.processes import make_accelerator

BASE, FOLDER = sys.argv[1], Path(sys.argv[2])
torch.set_num_threads(1)


class OnImageOne(Broken):
    """Gives `scores` for the image of position 1, else 0; raises where there are none."""

    def __call__(self, sr, batch):
        if not batch.paths[0].endswith("/1.png"):
            return torch.zeros(1)
        if self._scores is None:
            raise ZeroDivisionError("on image 1")
        return self._scores


class NoDisk(HeldOut):
    """Cannot write."""

    def _write(self, step, evaluation):
        if accelerator.is_main_process:
            raise UserError("no such disk")


accelerator = make_accelerator(torch.device("cpu"))
assert accelerator.num_processes == 2
adapter = load_adapter("osediff", BASE, noise_t=250, net_t=100, scale=4)
lora.load(adapter, FOLDER / "lora")
drawing, images = Drawing(), Images(3)
held_out = HeldOut(adapter, images, {"psnr": PSNR(), "drawing": drawing}, accelerator=accelerator, run=FOLDER / "two")
held_out.score(0)
scores = held_out.score(4).to_json()
assert images.asked == 2 * [(accelerator.process_index, 2)]
errors = []
for kind, reward in (
    (HeldOut, OnImageOne(torch.tensor([math.nan]))),
    (HeldOut, OnImageOne(None)),
    (NoDisk, drawing),
):
    calls = drawing.calls
    try:
        kind(adapter, images, {"bad": reward}, accelerator=accelerator).score()
    except Exception as error:
        errors.append(f"{type(error).__name__}: {error}")
    drawing.calls = calls
found = {"scores": scores, "calls": drawing.calls, "errors": errors}
(FOLDER / f"{accelerator.process_index}.json").write_text(json.dumps(found))
