"""What reward networks cost in fp32, TF32 and bf16, and what the lower precisions change in their scores.

    python tests/benchmarks/rewards.py --size 256 --crops 1          (CPU: seconds for most; TF32 is fp32 there)
    python tests/benchmarks/rewards.py --device cuda --size 512 --images 6,24

A group of similar outputs is scored: one photo, each time a little more blurred or noisy. Listed are seconds of a call
and peak GiB (CUDA) by precision; then for TF32 and bf16 the largest change of a score against fp32, relative to the
score and to the spread (standard deviation) of the group, and Kendall's tau of the two orders.
Metrics whose weights are in no cache get random ones. Costs are the same, but such a network hardly tells images apart:
its spread is next to nothing, and what a change is of it says little.
"""

import argparse
import contextlib
import importlib
import io
import sys
import time
import warnings
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import torch
from skimage.data import astronaut
from torch import Tensor, nn

from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards import iqa
from rewardsr.rewards.precision import Precision

METRICS = "musiq,maniqa,clipiqa,topiq_nr,liqe,hyperiqa,nima,lpips,dists,topiq_fr"
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16")
CLIP_SIZES = {  # what pyiqa reads off the file: embedding, image, layers, width, patch
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None),
    "ViT-B/32": (512, 224, 12, 768, 32),
}


class Nothing(dict[Any, Any]):
    """An empty checkpoint, in whichever layout it is read."""

    def __missing__(self, key: Any) -> "Nothing":
        return Nothing()


@contextlib.contextmanager
def random_weights() -> Iterator[None]:
    """Inside, networks are made without the files that they ask for."""
    clip = importlib.import_module("pyiqa.archs.clip_model")
    weights_of_torchvision = importlib.import_module("torchvision.models._api").WeightsEnum
    released = clip.load

    def made(name: str, *_: Any, **__: Any) -> nn.Module:
        network: nn.Module = clip.CLIP(*CLIP_SIZES[name], 77, 49408, 512, 8, 12).float()
        return network

    def nothing(*_: Any, **__: Any) -> Nothing:
        return Nothing()

    with contextlib.ExitStack() as stack:
        swap = [(nn.Module, "load_state_dict", nothing), (torch, "load", nothing)]
        swap += [(torch.hub, "load_state_dict_from_url", nothing), (weights_of_torchvision, "get_state_dict", nothing)]
        for name, module in list(sys.modules.items()):
            if name.startswith("pyiqa."):
                given = vars(module)
                swap += [(module, "load_pretrained_network", nothing)] if "load_pretrained_network" in given else []
                swap += [(module, "load_file_from_url", str)] if "load_file_from_url" in given else []
                swap += [(module, "load", made)] if given.get("load") is released else []
        for place in swap:
            stack.enter_context(iqa._swapped(*place))
        stack.enter_context(iqa._untrained_backbones())
        yield


def build(metric: str, crops: int | None) -> tuple[iqa.IQA, bool]:
    """The metric, and whether its weights are trained ones."""
    kind = str(iqa.metrics()[metric]["metric_opts"]["type"])
    averaging = iqa._network_parameters(metric, kind) & set(iqa._CROPS)
    options = iqa.IQAOptions(crops=crops if averaging else None)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with iqa._swapped(iqa, "cached_or_fetched", lambda owner, cached, *_: cached()):
                return iqa.IQA(metric, options), True
        except iqa.NotCachedError:
            torch.manual_seed(0)
            with random_weights():
                return iqa.IQA(metric, options), False


def group(images: int, size: int) -> tuple[Tensor, Batch]:
    """(images, 3, size, size): a photo, blurred and made noisy by degrees; and the photo itself as HQ."""
    photo = torch.from_numpy(astronaut()).permute(2, 0, 1)[None].float() / 255
    hq = nn.functional.interpolate(photo, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
    soft = nn.functional.avg_pool2d(hq, 3, 1, 1, count_include_pad=False)
    random = torch.Generator().manual_seed(0)
    members = [
        (1 - step / 10) * hq + step / 10 * soft + 0.004 * (1 + step) * torch.randn(hq.shape, generator=random)
        for step in torch.linspace(0, 5, images).tolist()
    ]
    sr, hq = torch.cat(members).clamp(0, 1), hq.expand(images, -1, -1, -1)
    return sr, Batch(lq=nn.functional.avg_pool2d(hq, 4), hq=hq, prompts=("a photo",) * images)


def measured(reward: iqa.IQA, precision: Precision, sr: Tensor, batch: Batch) -> tuple[Tensor, float, float | None]:
    """Scores, seconds of a second call, and the peak of its memory in GiB."""
    cuda, reward._precision = sr.is_cuda, precision
    with torch.no_grad():
        scores = reward(sr, batch)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        if cuda or precision != "tf32":
            scores = reward(sr, batch)
        if cuda:
            torch.cuda.synchronize()
    return scores, time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**30 if cuda else None


def kendall(one: Tensor, other: Tensor) -> float:
    """Kendall's tau of two rankings, ties counting for nothing."""
    pairs = list(combinations(range(len(one)), 2))
    agree = [((one[i] - one[j]).sign() * (other[i] - other[j]).sign()).item() for i, j in pairs]
    return sum(agree) / len(pairs)


def row(metric: str, images: int, chosen: argparse.Namespace) -> list[str]:
    """One line of the table."""
    reward, trained = build(metric, chosen.crops)
    sr, batch = group(images, chosen.size)
    sr, batch = sr.to(chosen.device), batch.to(chosen.device)
    results = {precision: measured(reward, precision, sr, batch) for precision in PRECISIONS}
    exact = results["fp32"][0].double().cpu()
    cells = [metric + ("" if trained else " (random)"), str(images)]
    for precision in PRECISIONS:
        _, seconds, peak = results[precision]
        known = sr.is_cuda or precision != "tf32"
        cells.append((f"{seconds:.3f}" if known else "-") + ("" if peak is None else f", {peak:.1f}"))
    for precision in PRECISIONS[1:]:
        scores = results[precision][0].double().cpu()
        change = (scores - exact).abs()
        relative = float((change / exact.abs().clamp(min=1e-12)).max())
        spread = float(change.max() / exact.std().clamp(min=1e-12))
        cells.append(f"{relative:.1e}, {spread:.2f}, {kendall(exact, scores):.2f}")
    return cells


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--images", default="6", help="in a call; comma-separated")
    parser.add_argument(
        "--crops", type=int, help="of metrics that average over some; default: the metric's (maniqa: 20)"
    )
    parser.add_argument("--metrics", default=METRICS, help="pyiqa's ids, comma-separated")
    return parser.parse_args()


def main() -> None:
    """Print the table, a line as soon as it is known."""
    chosen = arguments()
    change = "change relative, of spread, tau"
    seconds = [f"{precision}: s, GiB" for precision in PRECISIONS]
    titles = ["metric", "images", *seconds, *(f"{precision}: {change}" for precision in PRECISIONS[1:])]
    print("| " + " | ".join(titles) + " |")
    print("|" + " --- |" * len(titles))
    for metric in chosen.metrics.split(","):
        for images in map(int, chosen.images.split(",")):
            try:
                print("| " + " | ".join(row(metric, images, chosen)) + " |", flush=True)
            except (UserError, RuntimeError, ValueError) as error:  # out of memory, too small, or no network at all
                print(
                    f"| {metric} | {images} | {type(error).__name__}: {str(error).splitlines()[0][:120]} |", flush=True
                )


if __name__ == "__main__":
    main()
