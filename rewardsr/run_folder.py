"""Every file name of a run, once, the names in the header of its LoRA, and where in a run things lie."""

from pathlib import Path

RECIPE = "recipe.yaml"
LORA = "pytorch_lora_weights.safetensors"
FULL = "full_weights.safetensors"  # weights of the base that were trained themselves, where there are any
METRICS = "metrics.jsonl"
ENDING = "ending.json"  # how the run ended, and which step's weights it left
LOCK = ".lock"  # while a process trains there
VALIDATION = "validation"
PICTURES = "pictures"  # in VALIDATION: single ones, as pictures.write_cells names them; of an evaluation, by system
EVALUATION = "evaluation.json"  # in the folder of an evaluation
REPORT = "report.html"
VERSIONS = "versions.json"  # of what the run was last begun or resumed with
READY = "hub"  # what a push that found no connection has made ready

CHECKPOINTS = "checkpoints"  # a folder a step, with LORA, FULL and these
TRAINED = "trained.safetensors"
METHOD_STATE = "method.safetensors"
MOMENTS = "optimiser.safetensors"
STATE = "state.json"

# Of a published run:
CARD = "README.md"
SAMPLES = "samples"

# Keys of a LoRA file's text header:
DIFFUSERS_HEADER = "lora_adapter_metadata"  # where diffusers looks for rank and alpha
OUR_HEADER = "rewardsr"  # base, rank and alpha, as JSON


def checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints, oldest first: only a finished one ever gets its name."""
    return sorted((run / CHECKPOINTS).glob("step-*"))


def with_weights(run: Path) -> Path:
    """The folder that holds what a run has learnt: its own, or of a run that did not end its newest whole checkpoint.

    Where there is neither, it is the run's own.
    """
    held = [folder for folder in checkpoints(run) if (folder / LORA).is_file() or (folder / FULL).is_file()]
    return run if (run / LORA).is_file() or (run / FULL).is_file() or not held else held[-1]


def of_checkpoint(folder: Path) -> Path:
    """The folder of the run that a checkpoint belongs to; of anything else, the folder itself."""
    return folder.parent.parent if folder.absolute().parent.name == CHECKPOINTS else folder
