"""What tiles change in an upscaled image, against one that is not cut, in 8-bit levels.

    python tests/benchmarks/upscale_seams.py [--side 1280] [--tile 96] [--vae-tile 1024]

The images are a constant, a gradient and a photograph of the demo, repeated; the noise is the same. Prints a Markdown
table: the largest difference, the mean one, and the largest seam. A seam is a straight line, so it is looked for in the
means of the difference over columns and over rows: their largest change within 8 pixels. What the networks make of more
or less around them (attention, norms) differs as well, and is no seam.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from upscale_memory import SCALE, image

from rewardsr.data.images import from_pil
from rewardsr.draws import Draws
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.pipelines import load_adapter

WITHIN = 8  # pixels


def images(side: int) -> Iterator[tuple[str, Tensor]]:
    """LQ images for outputs of `side` pixels, (1, 3, H, W) in [0, 1]."""
    low = side // SCALE
    yield "constant", torch.full((1, 3, low, low), 0.5)
    yield "gradient", torch.linspace(0, 1, low).expand(1, 3, low, low).contiguous()
    yield "photograph", from_pil(image(side, side))[None]


def main() -> None:
    """Measure each kind of image with each kind of tiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=1280, help="of the output, in pixels")
    parser.add_argument("--tile", type=int, default=96, help="of latents")
    parser.add_argument("--vae-tile", type=int, default=1024, help="in pixels")
    given = parser.parse_args()
    tile, vae_tile = {"tile": given.tile}, {"vae_tile": given.vae_tile}
    whole = {"tile": None, "vae_tile": None}
    cuts = {"latents": whole | tile, "autoencoder": whole | vae_tile, "both": tile | vae_tile}
    print("| image | tiles of | largest | mean | seam |\n|---|---|---|---|---|", flush=True)
    for kind, lq in images(given.side):
        expected = upscaled(lq, whole)
        for name, options in cuts.items():
            away = (upscaled(lq, options) - expected) * 255
            largest, mean = float(away.abs().max()), float(away.abs().mean())
            print(f"| {kind} | {name} | {largest:.3f} | {mean:.3f} | {seam(away):.3f} |", flush=True)


def seam(away: Tensor) -> float:
    """The largest seam of differences, (1, 3, H, W)."""
    lines = (away.mean(across)[0] for across in (-1, -2))
    return max(float((line[:, WITHIN:] - line[:, :-WITHIN]).abs().max()) for line in lines)


def upscaled(lq: Tensor, options: dict[str, int | None]) -> Tensor:
    """What the embedded pipeline makes of `lq` with these adapter options."""
    adapter = load_adapter("osediff", "embedded", device="cpu", **options)
    return upscale_tensor(adapter, lq, generator=Draws(0, 0, [0], "upscale"))


if __name__ == "__main__":
    main()
