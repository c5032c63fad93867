"""Teach the small latent diffusion model of `tools.prior` one-step restoration: a base as stage one leaves it.

    python -m tools.restorer --photos DIR --start PIPELINE --steps 4000 --out PIPELINE

From the noised latents of an LQ image, one step gives an image that could have been its HQ. What it learns from is the
energy score of trainer `naosd`, of images and of latents: draws differ where LQ leaves open what was there. This is for
speed only: `naosd` has the same loss in float32, and finishes what comes out here.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rewardsr.schedule import VP
from rewardsr.trainers.distillation import energy_loss, energy_score
from tools import crops
from tools.learning import Learner
from tools.pipeline import load, prompts, save

NOISE_T, NET_T = 250, 100
SHAPES = ((64, 8), (96, 4))  # pixels a side of a crop, crops in a batch; taken in turn
APART = 0.9  # weight of what keeps two draws apart; 1 is the energy score, less is more faithful


def train(photos: Path, start: Path, out: Path, steps: int, seed: int, lr: float) -> None:
    """Train, and save the pipeline with the averaged weights to `out` every 500 steps and at the end."""
    torch.manual_seed(seed)
    parts = load(start)
    vae, unet = parts["vae"], parts["unet"].requires_grad_(True).train()
    schedule, factor, texts = VP(parts["scheduler"].alphas_cumprod), vae.config.scaling_factor, prompts(parts)
    learner = Learner(unet, lr, steps, warm_up=100, decay=0.998)
    data = crops.Crops(photos, seed)
    begin, log = time.monotonic(), np.zeros(2)
    for step in range(1, steps + 1):
        size, count = SHAPES[step % len(SHAPES)]
        lq, hq = data.batch(size, count)
        enlarged = F.interpolate(lq, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
        text = texts[torch.randint(len(texts), (count,), generator=data.generator)].repeat(2, 1, 1)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                z, z_hq = (vae.encode(torch.cat([enlarged, hq]) * 2 - 1).latent.float() * factor).chunk(2)
            z_t = schedule.add_noise(z.repeat(2, 1, 1, 1), torch.randn(2 * count, *z.shape[1:]), NOISE_T)
            times = torch.full((2 * count,), NET_T)
            z0 = schedule.x0(z_t, unet(z_t, times, encoder_hidden_states=text).sample.float(), NET_T)
            images = vae.decode(z0 / factor).sample.float() / 2 + 0.5
        image = energy_loss(_pairs(images), hq, APART)
        latent = 0.02 * energy_score(_pairs(z0), z_hq, 2, APART)
        learner.step(step, image + latent)
        log += [image.item(), latent.item()]
        if step % 100 == 0:
            print(f"step {step} {(time.monotonic() - begin) / 60:.1f} min losses {log / 100}", flush=True)
            log[:] = 0
        if step % 500 == 0 or step == steps:
            save({**parts, "unet": learner.average}, out)


def _pairs(draws: Tensor) -> Tensor:
    """(B, 2, ...) of (2 * B, ...), whose second half are the second draws."""
    return draws.unflatten(0, (2, -1)).transpose(0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    given = parser.parse_args()
    train(given.photos, given.start, given.out, given.steps, given.seed, given.learning_rate)
