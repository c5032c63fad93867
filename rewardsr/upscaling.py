"""Running a pipeline over tensors and files, and colour fixes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardsr.adapter import Batch, ISRAdapter
from rewardsr.captions import ADAPTER, first_few, resolve_prompts
from rewardsr.draws import Draws, Source
from rewardsr.errors import UserError
from rewardsr.extras import check_extras, resolve_extras, stack_extras
from rewardsr.images import read_image, write_image

COLOR_FIXES = ("none", "adain", "wavelet")

_WAVELET_LEVELS = 5
_EPS = 1e-5


def adain(sr: Tensor, reference: Tensor) -> Tensor:
    """Give each channel the mean and standard deviation that it has in the reference.

    Adaptive instance normalisation (Huang and Belongie, 2017) on pixels, as StableSR and its successors use it:
    statistics over the whole image, unbiased variance, 1e-5 added before the root.

    Args:
        sr: (B, 3, H, W) in [0, 1].
        reference: (B, 3, h, w) in [0, 1], of any size.

    Returns:
        (B, 3, H, W) in [0, 1].
    """
    return _restyled(sr, reference).clamp(0, 1)


def wavelet(sr: Tensor, reference: Tensor) -> Tensor:
    """Take the coarse colours from the reference and the details from `sr`.

    Coarse is what is left after five blurs of doubling width (the a-trous wavelet transform), as in StableSR.

    Args:
        sr: (B, 3, H, W) in [0, 1].
        reference: of the same shape.

    Returns:
        (B, 3, H, W) in [0, 1].

    Raises:
        ValueError: the shapes differ.
    """
    if sr.shape != reference.shape:
        raise ValueError(f"wavelet: sr is {tuple(sr.shape)}, but the reference is {tuple(reference.shape)}")
    return (sr - _coarse(sr) + _coarse(reference)).clamp(0, 1)


def fix_color(sr: Tensor, reference: Tensor, color_fix: str) -> Tensor:
    """Apply the colour fix of this name: "none", "adain" or "wavelet".

    Raises:
        UserError: another name.
    """
    _check_color_fix(color_fix)
    if color_fix == "none":
        return sr
    return (adain if color_fix == "adain" else wavelet)(sr, reference)


@torch.no_grad()
def upscale_tensor(
    adapter: ISRAdapter,
    lq: Batch | Tensor,
    prompts: Sequence[str] | None = None,
    generator: Source | None = None,
    color_fix: str = "none",
) -> Tensor:
    """Super-resolve images.

    Args:
        adapter: the pipeline.
        lq: (B, 3, h, w) float32 in [0, 1], or a Batch, which brings its own prompts and extras.
        prompts: one text an image; None leaves it to the adapter; only with a bare tensor.
        generator: source of the start noise; only a deterministic pipeline does without.
        color_fix: "none", "adain" or "wavelet", against the bicubic enlargement of `lq`.

    Returns:
        `sr` (B, 3, scale * h, scale * w) float32 in [0, 1], on the adapter's device.

    Raises:
        UserError: an unknown colour fix.
        ValueError: a tensor that breaks the contract.
    """
    _check_color_fix(color_fix)
    condition = adapter.encode(lq, prompts, generator if adapter.noisy_condition else None)
    sr = adapter.sample(condition, generator)
    image = lq.lq if isinstance(lq, Batch) else lq
    expected = (image.shape[0], 3, image.shape[2] * adapter.scale, image.shape[3] * adapter.scale)
    if tuple(sr.shape) != expected:
        raise ValueError(f"adapter '{adapter.name}' made {tuple(sr.shape)}, expected {expected}")
    if color_fix == "none":
        return sr
    return fix_color(sr, adapter.upsample(image.to(sr.device)), color_fix)


def upscale_files(
    adapter: ISRAdapter,
    inputs: Sequence[Path],
    output: Path | str,
    *,
    seed: int = 0,
    color_fix: str = "none",
    prompts: str = ADAPTER,
    overwrite: bool = False,
    progress: Callable[[int, int, Path], None] | None = None,
) -> list[Path]:
    """Super-resolve image files, one at a time, to `<stem>.png` in a folder.

    All inputs are decoded once before any work, and nothing is written if one of them is bad. An input is never
    overwritten. Files are finished one by one: what is there after an interruption is whole.

    Args:
        adapter: the pipeline.
        inputs: image files.
        output: a folder; made if need be.
        seed: image i is sampled with noise from (seed, i).
        color_fix: "none", "adain" or "wavelet".
        prompts: "adapter", "sidecar" (`<stem>.txt` beside the image), or one text for all.
        overwrite: replace files of an earlier run.
        progress: called with (done, total, file written) after every image.

    Returns:
        The files written, in the order of the inputs.

    Raises:
        UserError: no inputs, an unreadable one, two of one stem, an output that exists already or is an input.
    """
    _check_color_fix(color_fix)
    inputs, output = [Path(path) for path in inputs], Path(output)
    targets = _targets(inputs, output, overwrite)
    texts = resolve_prompts(inputs, prompts)
    extras = resolve_extras(inputs, adapter.extras)
    for path in inputs:
        read_image(path)
    check_extras(extras or [], adapter.extras)
    for index, (path, target) in enumerate(zip(inputs, targets, strict=True)):
        batch = Batch(
            lq=read_image(path)[None],
            prompts=None if texts is None else (texts[index],),
            paths=(str(path),),
            extras=stack_extras([] if extras is None else [extras[index]], adapter.extras),
        )
        sr = upscale_tensor(adapter, batch, generator=Draws(seed, 0, [index], "upscale"), color_fix=color_fix)
        write_image(sr, target)
        if progress is not None:
            progress(index + 1, len(inputs), target)
    return targets


def _targets(inputs: list[Path], output: Path, overwrite: bool) -> list[Path]:
    if not inputs:
        raise UserError("no images to upscale")
    if output.exists() and not output.is_dir():
        raise UserError(f"output '{output}' is a file; give a folder")
    targets = [output / f"{path.stem}.png" for path in inputs]
    # Folded, because many file systems take A.png and a.png for one file.
    seen: dict[str, Path] = {}
    for path, target in zip(inputs, targets, strict=True):
        other = seen.setdefault(target.name.casefold(), path)
        if other is not path:
            raise UserError(f"'{other}' and '{path}' would both become '{target}': rename one, or upscale them apart")
    existing = [target for target in targets if target.exists()]
    for target in existing:
        if any(path.exists() and target.samefile(path) for path in inputs):
            raise UserError(f"'{target}' is an input and would be overwritten: choose another output folder")
    if existing and not overwrite:
        names = first_few([path.name for path in existing])
        raise UserError(f"'{output}' has {len(existing)} of the results already ({names}): allow overwriting")
    return targets


def _check_color_fix(color_fix: str) -> None:
    if color_fix not in COLOR_FIXES:
        raise UserError(f"unknown colour fix '{color_fix}': choose one of {', '.join(COLOR_FIXES)}")


def _restyled(sr: Tensor, reference: Tensor) -> Tensor:
    (sr_mean, sr_std), (mean, std) = _statistics(sr), _statistics(reference)
    return (sr - sr_mean) / sr_std * std + mean


def _statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel, (B, 3, 1, 1)."""
    unbiased = int(image.shape[-2] * image.shape[-1] > 1)  # a single pixel has no unbiased variance
    variance, mean = torch.var_mean(image, dim=(-2, -1), keepdim=True, correction=unbiased)
    return mean, (variance + _EPS).sqrt()


def _coarse(image: Tensor) -> Tensor:
    for level in range(_WAVELET_LEVELS):
        image = _blur(image, 2**level)
    return image


def _blur(image: Tensor, distance: int) -> Tensor:
    """Weights 1/4, 1/2, 1/4 at this distance in both directions, borders replicated."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (distance,) * 4, mode="replicate")
    rows = padded[..., :height, :] + 2 * padded[..., distance : distance + height, :] + padded[..., 2 * distance :, :]
    return (rows[..., :width] + 2 * rows[..., distance : distance + width] + rows[..., 2 * distance :]) / 16
