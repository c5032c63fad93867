"""How a run ended, as its folder tells it."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from rewardsr.errors import UserError
from rewardsr.run_folder import ENDING, VALIDATION
from rewardsr.storage import read_text


@dataclass(frozen=True)
class Ending:
    """How a run ended; `ending.json` in its folder.

    Attributes:
        step: the last one that was taken.
        shipped: the step whose weights lie in the folder.
        stopped: why the run ended before its last step; None: it did not.
        best: the step of the best checkpoint, which is kept; None where none was kept or none qualified.
        rule: by which it is the best.
    """

    step: int
    shipped: int
    stopped: str | None
    best: int | None
    rule: str


def read_ending(run: Path) -> Ending | None:
    """How a run ended; None where it has not.

    Raises:
        UserError: the record is damaged.
    """
    path = run / ENDING
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path, f"'{path}'"))
        return Ending(**{entry.name: content[entry.name] for entry in fields(Ending)})
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"'{path}' is damaged: {error}") from error


def last_validation(run: Path, kind: str) -> Path | None:
    """The file of a run's validation (".json" or ".png"): that of the weights it ships, else the newest.

    Raises:
        UserError: the record of its end is damaged.
    """
    ending = read_ending(run)
    shipped = None if ending is None else run / VALIDATION / f"step-{ending.shipped:08d}{kind}"
    if shipped is not None and shipped.is_file():
        return shipped
    return max((run / VALIDATION).glob(f"step-*{kind}"), default=None)
