"""The folder that an evaluation leaves: scores as JSON, CSV, Markdown and LaTeX, the pictures, and a page of it all."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rewardsr.data.images import encode_png
from rewardsr.errors import UserError, printable, shown
from rewardsr.evaluation.exports import as_csv, as_latex, as_markdown
from rewardsr.evaluation.page import read_page, write_page
from rewardsr.evaluation.report import LARGEST, Evaluation
from rewardsr.run_folder import EVALUATION, PICTURES, REPORT
from rewardsr.storage import check_folder, expand, read_text, remove_own_leftovers, write_bytes, write_text

SCORES, MARKDOWN, LATEX = "scores.csv", "table.md", "table.tex"
LQ, HQ = "LQ", "HQ"  # folders beside those of the systems
UNFINISHED = "unfinished"


class Results:
    """Writes to one folder, which is new, empty, or holds an evaluation of the same settings.

    Args:
        folder: need not be there.

    Raises:
        UserError: it holds something else, or cannot be written to.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = expand(folder)
        check_folder(self.folder)
        self._earlier: dict[str, Any] | None = None
        path = self.folder / EVALUATION
        if path.is_file():
            try:
                self._earlier = dict(json.loads(read_text(path, f"'{path}'", LARGEST)))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"'{path}' is damaged, or no evaluation: choose another folder") from error
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"'{self.folder}' holds something else than an evaluation: choose another folder")

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Take the folder for an evaluation of these settings; what was interrupted is known by them.

        Raises:
            UserError: it holds one of other settings; the first that differs is named.
        """
        if self._earlier is None:
            write_text(self.folder / EVALUATION, _as_json({UNFINISHED: True, "settings": settings}))
            return
        difference = next(_differences(self._earlier.get("settings", {}), json.loads(json.dumps(settings))), None)
        if difference is not None:
            raise UserError(
                f"'{self.folder}' holds an evaluation of other settings ({difference}): choose another folder"
            )
        remove_own_leftovers(self.folder)

    def check_weights(self, system: str, weights: Mapping[str, str]) -> None:
        """Refuse another pipeline or LoRA than the evaluation in the folder had under a system's name.

        Raises:
            UserError: it is another one.
        """
        earlier = (self._earlier or {}).get("weights", {}).get(system, dict(weights))
        difference = next(_differences(earlier, dict(weights)), None)
        if difference is not None:
            what = difference.partition(":")[0]
            raise UserError(
                f"'{self.folder}' holds an evaluation of another '{system}' (its {what} has changed since): choose "
                "another folder"
            )

    def picture(self, of: str, image: str, content: Tensor) -> None:
        """Write an image (1, 3, H, W) in [0, 1] of a system, or of LQ or HQ."""
        write_bytes(self.folder / PICTURES / of / f"{Path(image).stem}.png", encode_png(content))

    def finish(self, evaluation: Evaluation) -> None:
        """Write the tables, the file that says that all is there, and the page that shows it."""
        for name, written in ((SCORES, as_csv), (MARKDOWN, as_markdown), (LATEX, as_latex)):
            # File names may hold what no text file can.
            write_text(self.folder / name, printable(written(evaluation), but="\n"))
        write_text(self.folder / EVALUATION, evaluation.to_json())
        write_page(self.folder / REPORT, read_page([self.folder]))


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two values of JSON differ, in words."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from _differences(one.get(key), other.get(key), f"{place}.{key}" if place else str(key))
    elif one != other:
        yield f"{place}: {shown(one)} there, {shown(other)} here"
