"""What a run tells: `metrics.jsonl` always, a bar with what matters, each validation in words, and its trackers."""

import json
import logging
import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rewardsr import console, progress
from rewardsr.errors import UserError, printable
from rewardsr.run_folder import METRICS
from rewardsr.storage import read_bytes, write_bytes
from rewardsr.train.recipe import Recipe

logger = logging.getLogger(__name__)

LARGEST_LOG = 2**30  # bytes; a step has about 500
RECENT = 50  # steps that the numbers beside the bar are means of: a step of a few images tells little
# Metrics that the bar shows, and how it calls them, from the most to the least telling; "x/" stands for all that begin
# so. What the reference samples scores does not rise with training, whatever the policy learns.
SHOWN = {
    "loss": "loss",
    "implicit_accuracy": "accuracy",
    "loss/": "",
    "group/pixel_std": "spread",
    "grad_norm": "gradient",
    "reference/": "base ",
}
UP, DOWN, UNCLEAR = "↑", "↓", "~"  # an interval above 0, below 0, and around it


class Tracker(Protocol):
    """Where numbers and pictures go beside the file; see `rewardsr.train.trackers`."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step."""

    def show(self, rows: Sequence[Any], step: int) -> None:
        """Pictures of a validation."""

    def finish(self) -> None:
        """Close it."""


class RunLog:
    """The log of one process; all but the main process stay silent.

    Args:
        run: the run's folder.
        recipe: of the run.
        start: steps that a resumed run has behind it; later lines of an earlier attempt are dropped.
        active: whether this is the main process.
        tracker: gets the same.

    Attributes:
        validated: the kept lines that tell of a validation, by step.
    """

    def __init__(self, run: Path, recipe: Recipe, start: int, active: bool, tracker: Tracker | None = None) -> None:
        self._file = run / METRICS
        self._active, self._steps, self._start, self._tracker = active, recipe.steps, start, tracker
        self._steering = [reward.name for reward in recipe.rewards if reward.weight > 0]
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._gains: list[str] = []
        self._open = ExitStack()
        self._advance: progress.Advance = lambda n=1, note="", total=None: None
        self.validated = _keep_until(self._file, start) if active else dict[int, dict[str, Any]]()

    def __enter__(self) -> Self:
        if self._tracker is not None:
            self._open.callback(self._tracker.finish)
        if self._active:
            lines = max(1, self._steps // 20)
            self._advance = self._open.enter_context(progress.bar("step", self._steps, done=self._start, every=lines))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def write(self, step: int, metrics: dict[str, Any], rows: Sequence[Any] = ()) -> None:
        """One step's line, or a validation's; flushed, so that a killed run keeps it.

        Args:
            step: it is of.
            metrics: of the step, or {"validation": means, difference, interval and margin by metric}.
            rows: pictures of the validation, for the trackers.
        """
        if not self._active:
            return
        try:
            with self._file.open("a") as file:
                file.write(json.dumps(_plain({"step": step, **metrics}), allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write '{self._file}': {error.strerror or error}") from error
        if self._tracker is not None:
            self._tracker.log(flatten(metrics), step)
            self._tracker.show(rows, step)
        if "validation" in metrics:
            self._tell(step, metrics["validation"])
        else:
            self._advance(note="  ".join(self._parts(metrics)))

    def _parts(self, metrics: Mapping[str, Any]) -> Iterator[str]:
        """What the bar says beside its numbers, the most important first."""
        if metrics.get("skipped"):
            yield f"skipped {metrics['skipped']:.0f}"
        yield from self._gains
        for key, called in SHOWN.items():
            for name in [name for name in metrics if name == key or (key[-1] == "/" and name.startswith(key))]:
                recent, value = self._recent[name], metrics[name]
                if isinstance(value, float | int) and math.isfinite(value):
                    recent.append(value)
                    shown = called + (name.removeprefix(key) if key[-1] == "/" else "")
                    yield f"{printable(shown)} {sum(recent) / len(recent):.3g}"

    def _tell(self, step: int, found: Mapping[str, Any]) -> None:
        """Say what a validation found, and keep the change of what steers for the bar."""
        for line in validation_lines(step, found, self._steering, console.columns()):
            logger.info(line)
        if any(entry["difference"] for entry in found.values()):
            steering = {name: found[name] for name in self._steering if name in found}
            self._gains = [f"{name} {entry['difference']:+.2g}{arrow(entry)}" for name, entry in steering.items()]


def arrow(entry: Mapping[str, Any]) -> str:
    """Where a comparison (`Comparison.summary`) went: up or down with its whole interval, or unclear."""
    low, high = entry["interval"]
    if low is None:  # of one image there is no interval
        return UNCLEAR
    return UP if low > 0 else DOWN if high < 0 else UNCLEAR


def validation_lines(
    step: int, found: Mapping[str, Any], steering: Sequence[str], width: int | None = None
) -> Iterator[str]:
    """A validation in words: what steers first, then what only watches.

    Args:
        step: it was made after.
        found: `Comparison.summary` by metric.
        steering: metrics that steer the trainer.
        width: columns of the screen; where a line does not fit, its numbers follow below; None: lines may be long.
    """
    if not any(entry["difference"] for entry in found.values()):
        means = ", ".join(f"{name} {_number(entry['base_mean'])}" for name, entry in found.items())
        yield f"validation at step {step}: as the base: {means}"
        return
    yield f"validation at step {step}, base -> policy, change [95 % interval]:"
    rows = []
    for name in sorted(found, key=lambda name: name not in steering):
        entry = found[name]
        low, high = (math.nan if end is None else end for end in entry["interval"])
        means = f"{_number(entry['base_mean'])} -> {_number(entry['tuned_mean'])}"
        interval = "" if math.isnan(low) else f" [{_signed(low)}, {_signed(high)}]"
        role = "steers" if name in steering else "guard"
        rows.append((f"  {role:<6} {arrow(entry)} {name}", means, _signed(entry["difference"]) + interval))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for row in rows:
        line = f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}"
        if width is None or len(line) <= width:
            yield line
        else:
            yield row[0]
            yield from (f"           {part}" for part in row[1:])


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"+{_number(value)}" if value >= 0 else _number(value)


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as `a/b` numbers, as trackers want them; of an interval its ends, `a/low` and `a/high`."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if name == "interval":
            value = dict(zip(("low", "high"), value, strict=True))
            flat |= flatten(value, prefix)
        elif isinstance(value, dict):
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
