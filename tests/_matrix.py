"""Every adapter that comes along, on a tiny real base, with what each trainer is to make of it.

Shared by `test_matrix.py`, which trains them all, and `benchmarks/matrix.py`, which times them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _data import DATA
from safetensors.torch import save_file

from rewardsr.testing import tiny_pipeline, write_images
from rewardsr.train.prepare import method_class

STEPS = 3
SAMPLER = 5  # steps of the samplers: RFSR's early window is then 0 and 1, its late one 4, and 2 and 3 are in neither
SEED = 10  # with it, RFSR draws early steps alone, then late ones alone, then one of each
CROP, SIDE = 32, 40  # pixels: of the training crops, and of the images


@dataclass(frozen=True)
class Row:
    """An adapter as a user would configure it.

    Attributes:
        name: of the row.
        adapter: registered name, or `module:Name`.
        base: which of `bases`.
        options: of the adapter.
        extras: whether image embeddings lie beside the images.
        refused_by: what a trainer that cannot train it names when it says so.
    """

    name: str
    adapter: str
    base: str
    options: Mapping[str, Any]
    extras: bool = False
    refused_by: Mapping[str, str] = field(default_factory=dict)


MANY = {"naosd": "pipelines of one step"}
ROWS = (
    Row("osediff", "osediff", "sd", {"noise_t": 250, "net_t": 100}),
    Row("osediff without noise", "osediff", "sd", {}, refused_by={"gdpo": "noise_t"}),
    Row("seesr, tagger", "seesr", "seesr", {"steps": SAMPLER, "tagger": "taggers:Means"}, refused_by=MANY),
    Row("seesr, files", "seesr", "seesr", {"steps": SAMPLER}, extras=True, refused_by=MANY),
    Row("sd_upscaler", "sd_upscaler", "upscaler", {"steps": SAMPLER}, refused_by=MANY),
    Row("stablesr", "stablesr", "stablesr", {"steps": SAMPLER}, refused_by=MANY),
    Row("flow", "rewardsr.testing.flow:TinyFlow", "flow", {"steps": SAMPLER, "guidance": 1.5}, refused_by=MANY),
)

# What each trainer gets besides its defaults; the narrow VGG19 is here so that RFSR's style term runs.
TRAINERS: dict[str, dict[str, Any]] = {
    "gdpo": {"group_size": 2},
    "naosd": {"full": "none", "lpips_weight": 0},
    "rfsr": {"vgg": str(DATA / "vgg19_narrow.safetensors")},
}


def bases(folder: Path) -> dict[str, str]:
    """The tiny pipelines, by the name that rows have for them."""
    return {
        "sd": str(tiny_pipeline(folder / "sd")),
        "upscaler": str(tiny_pipeline(folder / "upscaler", family="upscaler")),
        "stablesr": str(tiny_pipeline(folder / "stablesr", family="stablesr")),
        "flow": str(tiny_pipeline(folder / "flow", family="flow")),
        "seesr": str(DATA / "tiny_seesr"),
    }


def write_extras(folder: Path, count: int, seed: int = 0, **changes: torch.Tensor) -> Path:
    """Image embeddings `000.safetensors`, ... for images as `write_images` names them; `changes` replace tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    for index in range(count):
        save_file({"ram": torch.randn(10, 512, generator=random)} | changes, folder / f"{index:03}.safetensors")
    return folder


def recipe(row: Row, trainer: str, base: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A short run of a row in `folder/run`; the images are written as well."""
    for seed, (place, count) in enumerate({"train": 4, "held-out": 2}.items()):
        write_images(folder / place, count, SIDE, seed)
        if row.extras:
            write_extras(folder / place, count, seed)
    content: dict[str, Any] = {
        "adapter": row.adapter,
        "base": base,
        "adapter_options": dict(row.options),
        "trainer": trainer,
        "trainer_options": TRAINERS[trainer],
        "rewards": [{"name": "detail", "weight": int(method_class(trainer).rewarded)}],
        "guards": ["psnr"],
        "data": {"train": str(folder / "train"), "validation": str(folder / "held-out"), "crop": CROP},
        "optimiser": {"learning_rate": 1e-3},
        "output": str(folder / "run"),
        "steps": STEPS,
        "batch_size": 2,
        "seed": SEED,
        "device": "cpu",
    }
    return content | changes
