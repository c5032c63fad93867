"""Train the autoencoder of the embedded pipeline, by itself and from random weights.

    python -m tools.autoencoder --photos DIR --steps 7000 --out DIR
    python -m tools.autoencoder --photos DIR --steps 1200 --steady DIR --out DIR

Three things are asked of it beside faithful images. Latents are of one size in every channel, so that noise means the
same everywhere. Decoding stands noise, so that latents that are not quite right still give a clean image. And a
constant added to the latents, the same at every place, leaves fine detail as it is: otherwise that constant is a knob
that makes texture everywhere, and every reward for detail finds the knob first. `--steady` goes on with the decoder of
a trained one for that alone: of what a shift does, the part that is the same for all images is to vanish. Images are
`(B, 3, H, W)` RGB in [0, 1].
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from torch import Tensor, nn

from rewardsr.trainers.distillation import laplacian
from tools import crops
from tools.learning import Learner

SIZE, COUNT = 64, 8  # pixels a side of a crop, crops in a batch
NOISE = 0.3  # largest standard deviation of the noise that decoding has to stand, against latents of 1
SHIFT = 1.0  # largest length of the constant, over channels, against latents of 1
STEADY = 0.5  # the same where only the decoder goes on


def build(seed: int) -> AutoencoderDC:
    """A new autoencoder with random weights: 16 channels, four pixels to a latent."""
    torch.manual_seed(seed)
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=16,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(48, 48, 96),
        decoder_block_out_channels=(48, 48, 96),
        # No blocks at full resolution: they would cost more than all others together.
        encoder_layers_per_block=(0, 1, 2),
        decoder_layers_per_block=(0, 2, 3),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    )
    for module in vae.modules():
        if isinstance(module, ResBlock):
            nn.init.zeros_(module.norm.weight)  # every block starts as the identity, which learns faster
    return vae


def losses(vae: AutoencoderDC, images: Tensor) -> Tensor:
    """Error of the image, error of its detail, error of the detail under a constant shift, size of the latents."""
    with torch.autocast("cpu", torch.bfloat16):
        z = vae.encode(images * 2 - 1).latent.float()
        noise = NOISE * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        shift = torch.randn(*z.shape[:2], 1, 1)
        shift = SHIFT * torch.rand(len(z), 1, 1, 1) * shift / shift.norm(dim=1, keepdim=True)
        still = len(z) // 2
        shift[:still] = 0
        decoded = vae.decode(z + noise + shift).sample.float() / 2 + 0.5
    error = decoded - images
    detail = laplacian(error).abs()
    image = error[:still].abs().mean() + 5 * error[:still].square().mean()
    size = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
    return torch.stack([image, 0.2 * detail[:still].mean(), 0.4 * detail[still:].mean(), 0.1 * size])


def steady_losses(vae: AutoencoderDC, images: Tensor) -> Tensor:
    """Those of `losses` for a frozen encoder, and instead of the size the change of detail that all images share."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            z = vae.encode(images * 2 - 1).latent.float()
        length = STEADY * (0.2 + 0.8 * torch.rand(()))
        direction = torch.randn(1, z.shape[1], 1, 1)
        shift = length * direction / direction.norm()
        noise = NOISE * torch.rand(len(z), 1, 1, 1) * torch.randn_like(z)
        noise[: len(z) // 2] = 0
        still, shifted = (
            vae.decode(torch.cat([z, z + shift]) + noise.repeat(2, 1, 1, 1)).sample.float() / 2 + 0.5
        ).chunk(2)
    error = still - images
    image = error.abs().mean() + 5 * error.square().mean()
    moved = (_log_energy(shifted.clamp(0, 1)) - _log_energy(still.clamp(0, 1))).mean().abs() / length
    return torch.stack(
        [image, 0.2 * laplacian(error).abs().mean(), 0.4 * laplacian(shifted - images).abs().mean(), 0.3 * moved]
    )


def train(photos: Path, out: Path, steps: int, seed: int, lr: float, steady: Path | None = None) -> None:
    """Train, and save the averaged weights to `out` every 1,000 steps and at the end."""
    torch.manual_seed(seed)
    vae = build(seed) if steady is None else AutoencoderDC.from_pretrained(steady, torch_dtype=torch.float32)
    vae.encoder.requires_grad_(steady is None)
    learner, data = Learner(vae, lr, steps), crops.Crops(photos, seed)
    begin, log = time.monotonic(), np.zeros(4)
    for step in range(1, steps + 1):
        lq, hq = data.batch(SIZE, COUNT)
        # Enlarged LQ images among them: their blur and noise are to be in the latents as well.
        enlarged = F.interpolate(lq, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
        if steady is None:
            hq[:2] = enlarged[:2]
            parts = losses(vae, hq[torch.randperm(COUNT)])
        else:
            parts = steady_losses(vae, hq.lerp(enlarged, torch.rand(COUNT, 1, 1, 1)))
        learner.step(step, parts.sum())
        log += parts.detach().numpy()
        if step % 200 == 0:
            print(f"step {step} {(time.monotonic() - begin) / 60:.1f} min losses {log / 200}", flush=True)
            log[:] = 0
        if step % 1000 == 0 or step == steps:
            learner.average.save_pretrained(out)


def _log_energy(image: Tensor) -> Tensor:
    """Logarithm of the energy of gray detail in cells of 8 pixels, as the reward `detail` has it."""
    return (F.avg_pool2d(laplacian(image.mean(1, keepdim=True)).abs(), 8) + 0.01).log()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--steady", type=Path)
    given = parser.parse_args()
    train(given.photos, given.out, given.steps, given.seed, given.learning_rate, given.steady)
