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
    "Recipe": "recipe",
    "UserError": "errors",
    "evaluate": "api",
    "finetune": "api",
    "load_adapter": "api",
    "load_lora": "api",
    "upscale": "api",
    "wrap": "api",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rewardsr' has no attribute '{name}'")
    return getattr(import_module(f"rewardsr.{_WHERE[name]}"), name)
