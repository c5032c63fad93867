"""Train, save and judge the embedded one-step pipeline.

    python -m tools.train_pipeline --minutes 55 --out DIR --seed 0
    python -m tools.train_pipeline --evaluate DIR

rewardsr/demo/README.md has the commands that the shipped weights come from.

The autoencoder and the UNet are trained together, from random weights, on the photographs of
`tools.crops.TRAIN`. Images are `(B, 3, H, W)` float32 RGB in [0, 1].
"""

import argparse
import copy
import json
import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.autoencoder_dc import ResBlock
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rewardsr.demo import photos
from rewardsr.schedule import VP
from rewardsr.testing.networks import write_tokenizer
from tools import crops

NOISE_T, NET_T, SCALE = 250, 100, 4
LATENT_STD = 3.5  # against noise of 1: more is more faithful and less diverse
# From this share of the time on: side of the crops in pixels, crops in a batch.
STAGES = ((0.0, 64, 8), (0.6, 96, 4), (0.9, 128, 2))
PROMPTS = (
    "", "a photo", "a person", "stone", "grass", "a machine", "text", "sharp, clean", "high quality", "fine detail",
)  # fmt: skip


@dataclass
class Parts:
    """The networks of the pipeline; `vae` and `unet` are trained, the text encoder stays random."""

    vae: AutoencoderDC
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler

    def trained(self) -> list[Tensor]:
        return [*self.vae.parameters(), *self.unet.parameters()]


def build(seed: int) -> Parts:
    """New networks with random weights."""
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
    unet = UNet2DConditionModel(
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=16,
        cross_attention_dim=32,
        attention_head_dim=4,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(Path(folder))
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    text_encoder.requires_grad_(False).eval()
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", clip_sample=False
    )
    return Parts(vae, unet, text_encoder, tokenizer, scheduler)


def load(folder: Path) -> Parts:
    """Load a saved pipeline in float32."""
    parts = Parts(
        AutoencoderDC.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32),
        UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=torch.float32),
        CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32),
        CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer"),
        DDPMScheduler.from_pretrained(folder, subfolder="scheduler"),
    )
    for module in (parts.vae, parts.unet, parts.text_encoder):
        module.requires_grad_(False).eval()
    return parts


def save(parts: Parts, folder: Path) -> None:
    """Write the pipeline in float16 beside `folder`, then swap it in: readers never see half of it."""
    fresh, stale = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    for name in ("vae", "unet", "text_encoder"):
        copy.deepcopy(getattr(parts, name)).half().save_pretrained(fresh / name)
    # transformers 5 writes one file of its own; the two older ones beside it are what version 4 reads.
    write_tokenizer(fresh / "tokenizer").save_pretrained(fresh / "tokenizer")
    parts.scheduler.save_pretrained(fresh / "scheduler")
    index: dict[str, str | list[str]] = {"_class_name": "DiffusionPipeline"}
    for name, part in sorted(vars(parts).items()):
        library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
        index[name] = [library, type(part).__name__]
    (fresh / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for path in fresh.rglob("*.safetensors"):
        path.chmod(0o644)  # they are written readable by their owner alone
    for path in fresh.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
        path.write_text(json.dumps(config, indent=2) + "\n")
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def embed(parts: Parts, prompts: list[str]) -> Tensor:
    """Text states `(len(prompts), 77, 32)`."""
    ids = parts.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        states: Tensor = parts.text_encoder(ids)[0]
    return states


def enlarge(lq: Tensor) -> Tensor:
    """Bicubic, PIL's kernel: `(B, 3, h, w)` to `(B, 3, 4h, 4w)`, in [0, 1]."""
    return F.interpolate(lq, scale_factor=SCALE, mode="bicubic", antialias=True).clamp(0, 1)


def clean(parts: Parts, z: Tensor, noise: Tensor, text: Tensor) -> Tensor:
    """The one step: latents of the enlarged `lq` in, predicted latents of `hq` out, all `(B, 16, h, w)`."""
    schedule = VP(parts.scheduler.alphas_cumprod)
    z_t = schedule.add_noise(z, noise, NOISE_T)
    t = torch.full((len(z),), NET_T)
    eps = parts.unet(z_t, t, encoder_hidden_states=text).sample.float()
    return schedule.x0(z_t, eps, NET_T)


def restore(parts: Parts, lq: Tensor, generator: torch.Generator, prompt: str = "") -> Tensor:
    """The whole pipeline without gradients: `lq` `(B, 3, h, w)` to `sr` `(B, 3, 4h, 4w)`, in [0, 1]."""
    factor = parts.vae.config.scaling_factor
    with torch.no_grad():
        z = parts.vae.encode(enlarge(lq) * 2 - 1).latent * factor
        noise = torch.randn(z.shape, generator=generator)
        text = embed(parts, [prompt]).expand(len(lq), -1, -1)
        sr = parts.vae.decode(clean(parts, z, noise, text) / factor).sample
    return (sr / 2 + 0.5).clamp(0, 1)


def laplacian(image: Tensor) -> Tensor:
    """Second differences of every channel, `(B, 3, H - 2, W - 2)`."""
    middle = image[..., 1:-1, 1:-1]
    around = image[..., :-2, 1:-1] + image[..., 2:, 1:-1] + image[..., 1:-1, :-2] + image[..., 1:-1, 2:]
    return around - 4 * middle


def distance(image: Tensor, target: Tensor) -> Tensor:
    """How far two images are apart: absolute and squared error, and absolute error of the fine detail."""
    detail = (laplacian(image) - laplacian(target)).abs().mean()
    return (image - target).abs().mean() + 5 * (image - target).square().mean() + 0.2 * detail


def losses(parts: Parts, lq: Tensor, hq: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Restoration, reconstruction and latent size; the latter two keep the autoencoder an autoencoder."""
    kept = max(1, len(hq) // 4)  # a quarter of the batch is enough to keep reconstruction good
    factor = parts.vae.config.scaling_factor
    with torch.autocast("cpu", torch.bfloat16):
        both = torch.cat([enlarge(lq), hq[:kept]]) * 2 - 1
        latent = parts.vae.encode(both).latent.float()
        z = latent[: len(lq)] * factor
        z_sr = clean(parts, z, torch.randn_like(z), text)
        images = parts.vae.decode(torch.cat([z_sr / factor, latent[len(lq) :]])).sample.float() / 2 + 0.5
    restoration = distance(images[: len(lq)], hq)
    reconstruction = distance(images[len(lq) :], hq[:kept])
    # Without this the encoder would grow its latents until the noise no longer matters.
    size = (latent.square().mean() - 1).square()
    return restoration, reconstruction, size


def warm_up_losses(parts: Parts, hq: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and latent size of the autoencoder alone."""
    with torch.autocast("cpu", torch.bfloat16):
        latent = parts.vae.encode(hq * 2 - 1).latent.float()
        image = parts.vae.decode(latent).sample.float() / 2 + 0.5
    return distance(image, hq), (latent.square().mean() - 1).square()


def train(
    out: Path, minutes: float, seed: int, warm_up: float, start: Path | None, lr: float, latent_std: float
) -> Parts:
    """Train for a given time; the averaged weights are saved to `out` every four minutes and at the end.

    `warm_up` is the share of the time in which the autoencoder learns alone: a bad one leaves the UNet nothing to
    learn from. `start` is a saved pipeline to go on from.
    """
    torch.manual_seed(seed)
    parts = build(seed) if start is None else load(start)
    parts.vae.register_to_config(scaling_factor=latent_std)
    for parameter in parts.trained():
        parameter.requires_grad_(True)
    average = copy.deepcopy(parts)
    pairs, prompts = crops.Crops(list(crops.TRAIN), seed), embed(parts, list(PROMPTS))
    optimiser = torch.optim.AdamW(parts.trained(), lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    begin = saved = time.monotonic()
    step, done, log = 0, 0.0, np.zeros(3)
    while done < 1:
        _, size, count = [stage for stage in STAGES if stage[0] <= done][-1]
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 200) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        lq, hq = pairs.batch(size, count)
        text = prompts[torch.randint(len(prompts), (count,), generator=pairs.generator)]
        restoration = torch.zeros(())
        if done < warm_up:
            reconstruction, latent_size = warm_up_losses(parts, hq)
        else:
            restoration, reconstruction, latent_size = losses(parts, lq, hq, text)
        optimiser.zero_grad()
        (restoration + 0.5 * reconstruction + 0.5 * latent_size).backward()
        nn.utils.clip_grad_norm_(parts.trained(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(average.trained(), parts.trained(), 1 - min(0.999, (1 + step) / (10 + step)))
        done = (time.monotonic() - begin) / (60 * minutes)
        log += [loss.item() for loss in (restoration, reconstruction, latent_size)]
        if step % 200 == 0:
            print(f"{done:6.1%} step {step} {size}px losses {log / 200}", flush=True)
            log[:] = 0
        if time.monotonic() - saved > 240:
            saved = time.monotonic()
            save(average, out)
            print(development(average), flush=True)
    save(average, out)
    print(f"{step} steps", development(average), flush=True)
    return average


def psnr(image: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return -10 * math.log10(max(float((image - target).square().mean()), 1e-12))


def luma(image: Tensor) -> Tensor:
    """Y of BT.601 in [16/255, 235/255], `(..., H, W)`."""
    red, green, blue = image.unbind(-3)
    return (65.481 * red + 128.553 * green + 24.966 * blue + 16) / 255


def ssim(image: Tensor, target: Tensor) -> float:
    """SSIM of Y with the usual Gaussian window."""
    from skimage.metrics import structural_similarity  # slow to import, and only evaluation needs it

    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return float(structural_similarity(luma(image).numpy(), luma(target).numpy(), **options))


@dataclass(frozen=True)
class Score:
    """Figures of one method on one picture, means over the draws where there are several."""

    psnr: float
    psnr_y: float
    ssim: float
    sharpness: float
    pixel_std: float = 0.0
    psnr_std: float = 0.0


def score(images: Tensor, hq: Tensor) -> Score:
    """Compare `(N, 3, H, W)` draws with `(3, H, W)`."""
    each = [psnr(image, hq) for image in images]
    return Score(
        psnr=float(np.mean(each)),
        psnr_y=float(np.mean([psnr(luma(image), luma(hq)) for image in images])),
        ssim=float(np.mean([ssim(image, hq) for image in images])),
        sharpness=float(laplacian(images).abs().mean()),
        pixel_std=float(images.std(0).mean()) if len(images) > 1 else 0.0,
        psnr_std=float(np.std(each, ddof=1)) if len(images) > 1 else 0.0,
    )


def judge(parts: Parts, pairs: list[photos.HeldOut], draws: int = 8) -> list[tuple[str, Score, Score, float]]:
    """For each pair: name, bicubic, pipeline, PSNR of the autoencoder's reconstruction of `hq`."""
    rows = []
    for index, pair in enumerate(pairs):
        generator = torch.Generator().manual_seed(index)
        sr = torch.cat([restore(parts, pair.lq[None], generator) for _ in range(draws)])
        with torch.no_grad():
            rebuilt = (parts.vae(pair.hq[None] * 2 - 1).sample[0] / 2 + 0.5).clamp(0, 1)
        bicubic = score(enlarge(pair.lq[None]), pair.hq)
        rows.append((pair.name, bicubic, score(sr, pair.hq), psnr(rebuilt, pair.hq)))
    return rows


def table(rows: list[tuple[str, Score, Score, float]]) -> str:
    """The rows and their mean as a Markdown table; sharpness is the mean absolute Laplacian."""
    lines = [
        "| picture | method | PSNR RGB | PSNR Y | SSIM | sharpness | pixel std | PSNR std | AE PSNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, bicubic, pipeline, rebuilt in [*rows, ("mean", *_mean(rows))]:
        for method, s in (("bicubic", bicubic), ("pipeline", pipeline)):
            line = f"| {name} | {method} | {s.psnr:.2f} | {s.psnr_y:.2f} | {s.ssim:.4f} | {s.sharpness:.4f} |"
            spread = f" {s.pixel_std:.4f} | {s.psnr_std:.3f} | {rebuilt:.1f} |"
            lines.append(line + (spread if s is pipeline else " - | - | - |"))
    return "\n".join(lines)


def _mean(rows: list[tuple[str, Score, Score, float]]) -> tuple[Score, Score, float]:
    def average(scores: list[Score]) -> Score:
        columns = zip(*(vars(score).values() for score in scores), strict=True)
        return Score(*(float(np.mean(column)) for column in columns))

    bicubic, pipeline, rebuilt = (list(column) for column in list(zip(*rows, strict=True))[1:])
    return average(bicubic), average(pipeline), float(np.mean(rebuilt))


def development(parts: Parts) -> str:
    """One line to watch while training."""
    pairs = crops.development()
    if not pairs:
        return "no development picture"
    bicubic, pipeline, rebuilt = _mean(judge(parts, pairs, draws=3))
    return (
        f"development: {pipeline.psnr:.2f} dB ({pipeline.psnr - bicubic.psnr:+.2f}), "
        f"sharpness {pipeline.sharpness:.4f} ({bicubic.sharpness:.4f}), pixel std {pipeline.pixel_std:.4f}, "
        f"PSNR std {pipeline.psnr_std:.3f}, autoencoder {rebuilt:.1f} dB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train or judge the embedded pipeline.")
    parser.add_argument("--minutes", type=float, default=55, help="wall-clock training time")
    parser.add_argument("--out", type=Path, help="folder to write the pipeline to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", type=float, default=0.25, help="share of the time for the autoencoder alone")
    parser.add_argument("--start", type=Path, metavar="DIR", help="saved pipeline to go on from")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="at its highest")
    parser.add_argument("--latent-std", type=float, default=LATENT_STD, help="standard deviation of the latents")
    parser.add_argument("--threads", type=int, help="CPU threads; one is best where other programs run")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="print the held-out table of a pipeline")
    given = parser.parse_args()
    if (given.out is None) == (given.evaluate is None):
        parser.error("expected exactly one of --out (train) and --evaluate")
    torch.set_num_threads(given.threads or torch.get_num_threads())
    if given.evaluate is not None:
        print(table(judge(load(given.evaluate), photos.held_out())))
        return
    train(given.out, given.minutes, given.seed, given.warm_up, given.start, given.learning_rate, given.latent_std)


if __name__ == "__main__":
    main()
