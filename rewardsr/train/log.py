"""What a run tells: `metrics.jsonl` always, a progress bar, and TensorBoard or Weights & Biases on request."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rewardsr.errors import UserError, printable
from rewardsr.run_folder import METRICS
from rewardsr.storage import read_bytes, write_bytes
from rewardsr.train.recipe import Recipe

LARGEST_LOG = 2**30  # bytes; a step has about 500
GROUPS = ("reference", "loss")
SHOWN = ("loss", "implicit_accuracy", "group/pixel_std", "seconds")


class RunLog:
    """The log of one process; all but the main process stay silent.

    Args:
        run: the run's folder.
        recipe: of the run.
        start: steps that a resumed run has behind it; later lines of an earlier attempt are dropped.
        active: whether this is the main process.

    Attributes:
        validated: the kept lines that tell of a validation, by step.
    """

    def __init__(self, run: Path, recipe: Recipe, start: int, active: bool) -> None:
        self._file = run / METRICS
        self._console = Console(stderr=True, quiet=not active)
        self._active, self._steps = active, recipe.steps
        self._trackers = _open_trackers(run, recipe) if active else []
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=not active or not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=recipe.steps, completed=start, status="")
        self.validated = _keep_until(self._file, start) if active else dict[int, dict[str, Any]]()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        for tracker in self._trackers:
            tracker.finish()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """One step's line; flushed, so that a killed run keeps it."""
        if not self._active:
            return
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(_plain({"step": step, **metrics}), allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write '{self._file}': {error.strerror or error}") from error
        for tracker in self._trackers:
            tracker.log(flatten(metrics), step=step)
        if "validation" in metrics:
            return
        status = " ".join(f"{name.split('/')[-1]} {metrics[name]:.3g}" for name in SHOWN if name in metrics)
        for group in GROUPS:  # rewards of the samples, or terms of the loss: whichever the method has
            entries = {
                name.removeprefix(f"{group}/"): metrics[name] for name in metrics if name.startswith(f"{group}/")
            }
            if entries:
                status += f" | {group} {' '.join(f'{name} {value:.4g}' for name, value in entries.items())}"
        status = printable(status)  # rewards and losses are named by whoever wrote them
        self._progress.update(self._task, completed=step, status=status)
        if not self._console.is_terminal and step and step % max(1, self._steps // 20) == 0:
            self._console.print(f"step {step}/{self._steps} {status}", highlight=False, markup=False, soft_wrap=True)


def flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as `a/b` numbers, as trackers want them."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            flat[prefix + name] = value
    return flat


def _plain(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def step_of(line: bytes) -> int | None:
    """The step that a line of metrics is of; None where it is something else, or was cut off while it was written."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = content.get("step") if isinstance(content, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _keep_until(file: Path, step: int) -> dict[int, dict[str, Any]]:
    """Drop the lines after `step`, and what are no lines of a step's metrics; those of validations, by step."""
    if not file.exists():
        return {}
    kept, validated = [], dict[int, dict[str, Any]]()
    for line in read_bytes(file, f"'{file}'", LARGEST_LOG).splitlines() if step > 0 else []:
        of = step_of(line)
        if of is not None and of <= step:
            kept.append(line + b"\n")
            content = json.loads(line)
            validated |= {of: content} if "validation" in content else {}
    write_bytes(file, b"".join(kept))
    return validated


def _open_trackers(run: Path, recipe: Recipe) -> list[Any]:
    """accelerate's trackers, started."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    opened = []
    for name in recipe.log_with:
        kind = LOGGER_TYPE_TO_CLASS[name]
        tracker = kind(run_name="rewardsr", logging_dir=run) if kind.requires_logging_directory else kind("rewardsr")
        if hasattr(tracker, "start"):  # recent versions of accelerate do not open a tracker when it is made
            tracker.start()
        tracker.store_init_configuration({key: str(value) for key, value in recipe.model_dump(mode="json").items()})
        opened.append(tracker)
    return opened


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is absent.

    Raises:
        UserError: one is.
    """
    from importlib.util import find_spec

    for name in names:
        if find_spec(name) is None:
            raise UserError(f"log_with {name}: the package is not installed; pip install 'rewardsr[{name}]'")
