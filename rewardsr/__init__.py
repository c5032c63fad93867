"""rewardsr: reward fine-tuning of diffusion-based image super-resolution pipelines.

The public names are imported when they are first used, so that `rewardsr --help` needs neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; tests hold it against `_WHERE`
    from rewardsr.adapter import ISRAdapter as ISRAdapter
    from rewardsr.batch import Batch as Batch
    from rewardsr.batch import Condition as Condition
    from rewardsr.draws import Draws as Draws
    from rewardsr.errors import TrainingError as TrainingError
    from rewardsr.errors import UserError as UserError
    from rewardsr.evaluation.evaluate import evaluate as evaluate
    from rewardsr.evaluation.report import Evaluation as Evaluation
    from rewardsr.evaluation.upscale import upscale as upscale
    from rewardsr.hub.publish import push as push
    from rewardsr.lora.exchange import export as export
    from rewardsr.lora.exchange import import_lora as import_lora
    from rewardsr.options import Options as Options
    from rewardsr.pipelines import load_adapter as load_adapter
    from rewardsr.pipelines import load_lora as load_lora
    from rewardsr.pipelines import wrap as wrap
    from rewardsr.train.finetune import finetune as finetune
    from rewardsr.train.recipe import Recipe as Recipe

__version__ = "0.1.0"

_WHERE = {
    "Batch": "batch",
    "Condition": "batch",
    "Draws": "draws",
    "Evaluation": "evaluation.report",
    "ISRAdapter": "adapter",
    "Options": "options",
    "Recipe": "train.recipe",
    "TrainingError": "errors",
    "UserError": "errors",
    "evaluate": "evaluation.evaluate",
    "export": "lora.exchange",
    "finetune": "train.finetune",
    "import_lora": "lora.exchange",
    "load_adapter": "pipelines",
    "load_lora": "pipelines",
    "push": "hub.publish",
    "upscale": "evaluation.upscale",
    "wrap": "pipelines",
}
__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'rewardsr' has no attribute '{name}'")
    return getattr(import_module(f"rewardsr.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
