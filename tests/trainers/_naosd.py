"""What the tests of the supervised trainer share: a tiny base, LPIPS's weights, images, recipes."""

from pathlib import Path

import torch
from _lpips import write_lpips
from runs import content
from safetensors.torch import load_file

from rewardsr import Batch, load_adapter, lora
from rewardsr.run_folder import FULL, LORA, MOMENTS, TRAINED
from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.trainers.naosd import NAOSD, NAOSDOptions


def write_base(folder: Path) -> Path:
    """Images, a base and LPIPS's weights."""
    write_images(folder / "images", 3, 24)
    tiny_pipeline(folder / "base")
    write_lpips(folder)
    return folder


def adapter_on(folder: Path, **more):
    return load_adapter("osediff", folder / "base", **{"noise_t": 250, "net_t": 100, "scale": 4, **more})


def batch(count: int = 2) -> Batch:
    random = torch.Generator().manual_seed(5)
    return Batch(torch.rand(count, 3, 8, 8, generator=random), torch.rand(count, 3, 32, 32, generator=random))


def recipe(folder: Path, output: str, **changes) -> dict:
    """A run of four steps, whose last two validate and write a checkpoint."""
    files = {"vgg": str(folder / "vgg.safetensors"), "lpips": str(folder / "heads.pth")}
    changes["trainer_options"] = files | changes.get("trainer_options", {})
    own = {"trainer": "naosd", "rewards": [], "steps": 4, "batch_size": 2, "checkpoint_every": 2, "validate_every": 2}
    return content(folder, str(folder / "base"), output, **own | changes)


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").iterdir())[-1]


def left(run: Path) -> dict[str, torch.Tensor]:
    """Everything that a run and its last checkpoint keep."""
    files = [*(run / name for name in (LORA, FULL)), *(newest(run) / name for name in (TRAINED, MOMENTS))]
    return {f"{file.name}/{name}": value for file in files if file.is_file() for name, value in load_file(file).items()}


def make(adapter, **options) -> NAOSD:
    """The method on a pipeline; its outputs differ from the base's, and its second LoRA from nothing."""
    options = NAOSDOptions(**{"lpips_weight": 0, **options})
    targets = NAOSD.lora_targets(adapter, options)
    if targets:
        lora.attach(adapter, targets=targets)
    method = NAOSD(adapter, {}, {}, options)
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in method.trained_weights().values():
            value.add_(0.02 * torch.randn(value.shape, generator=random))
    return method
