"""rewardsr: reward fine-tuning of diffusion-based image super-resolution pipelines.

The public names are imported when they are first used, so that `rewardsr --help` needs neither torch nor diffusers.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Batch": "adapter",
    "Condition": "adapter",
    "Draws": "draws",
    "ISRAdapter": "adapter",
    "Options": "options",
    "Recipe": "train.recipe",
    "UserError": "errors",
    "evaluate": "evaluation.protocol",
    "finetune": "train.finetune",
    "load_adapter": "pipelines",
    "load_lora": "pipelines",
    "upscale": "evaluation.upscale",
    "wrap": "pipelines",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rewardsr' has no attribute '{name}'")
    return getattr(import_module(f"rewardsr.{_WHERE[name]}"), name)
