"""Train the denoiser of the embedded pipeline as a small latent diffusion model, from random weights.

    python -m tools.prior --photos DIR --vae DIR --steps 6000 --out PIPELINE

It learns to denoise latents of HQ photographs at all times, which makes it what Stable Diffusion is to OSEDiff: what
`tools.restorer` starts from. The autoencoder is the one of `tools.autoencoder` and stays as it is; the text encoder is
random.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC

from rewardsr.schedule import VP
from tools import crops
from tools.learning import Learner
from tools.pipeline import LATENT_STD, build, prompts, save

SHAPES = ((64, 16), (128, 4))  # pixels a side of a crop, crops in a batch; taken in turn


def train(photos: Path, vae_folder: Path, out: Path, steps: int, seed: int, lr: float) -> None:
    """Train, and save the pipeline with the averaged weights to `out` every 2,000 steps and at the end."""
    vae = AutoencoderDC.from_pretrained(vae_folder, torch_dtype=torch.float32).requires_grad_(False).eval()
    parts = build(vae, seed)
    unet, schedule, texts = parts["unet"], VP(parts["scheduler"].alphas_cumprod), prompts(parts)
    learner, data = Learner(unet, lr, steps), crops.Crops(photos, seed)
    begin, log = time.monotonic(), 0.0
    for step in range(1, steps + 1):
        size, count = SHAPES[step % len(SHAPES)]
        hq = data.images(size, count)
        # Little noise more often than much: that is where textures are decided, and where restoration works.
        t = (1000 * torch.rand(count).pow(1.5)).long()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z0 = vae.encode(hq * 2 - 1).latent.float() * LATENT_STD
        noise = torch.randn_like(z0)
        text = texts[torch.randint(len(texts), (count,), generator=data.generator)]
        with torch.autocast("cpu", torch.bfloat16):
            prediction = unet(schedule.add_noise(z0, noise, t), t, encoder_hidden_states=text).sample.float()
        loss = F.mse_loss(prediction, noise)
        learner.step(step, loss)
        log += loss.item()
        if step % 200 == 0:
            print(f"step {step} {(time.monotonic() - begin) / 60:.1f} min loss {log / 200:.4f}", flush=True)
            log = 0.0
        if step % 2000 == 0 or step == steps:
            save({**parts, "unet": learner.average}, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    train(arguments.photos, arguments.vae, arguments.out, arguments.steps, arguments.seed, arguments.learning_rate)
