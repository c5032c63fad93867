"""Running a pipeline over tensors and files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rewardsr.adapter import Batch, ISRAdapter
from rewardsr.data.images import list_images, read_image, write_image
from rewardsr.data.sidecars import ADAPTER, check_tensors, first_few, resolve_prompts, stack_tensors, tensor_files
from rewardsr.draws import Draws, Source
from rewardsr.errors import UserError
from rewardsr.evaluation.colour import _check_color_fix, fix_color


def upscale(
    adapter: ISRAdapter,
    inputs: Sequence[Path | str],
    output: Path | str,
    *,
    color_fix: str = "none",
    seed: int = 0,
    prompts: str = "adapter",
    overwrite: bool = False,
    progress: Callable[[int, int, Path], None] | None = None,
) -> list[Path]:
    """Super-resolve image files or folders of them into a folder; see `rewardsr.evaluation.upscale.upscale_files`."""
    files: list[Path] = []
    for entry in map(Path, inputs):
        files += list_images(entry) if entry.is_dir() else [entry]
    return upscale_files(
        adapter,
        files,
        output,
        seed=seed,
        color_fix=color_fix,
        prompts=prompts,
        overwrite=overwrite,
        progress=progress,
    )


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
    extras = tensor_files(inputs, adapter.extras)
    for path in inputs:
        read_image(path)
    check_tensors(extras or [], adapter.extras)
    for index, (path, target) in enumerate(zip(inputs, targets, strict=True)):
        batch = Batch(
            lq=read_image(path)[None],
            prompts=None if texts is None else (texts[index],),
            paths=(str(path),),
            extras=stack_tensors([] if extras is None else [extras[index]], adapter.extras),
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
