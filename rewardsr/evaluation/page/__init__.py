"""`report.html`: one file that shows what runs and evaluations found, and needs no network, server or font.

Names of images and metrics, recipes and notes come from anywhere. In the page they are escaped text, or JSON that a
script writes as text; the page's policy forbids every script but its own, and every request.
"""

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from rewardsr import __version__
from rewardsr.errors import UserError
from rewardsr.evaluation.page.content import EvaluationView, Page, Picture, RunView, distinct
from rewardsr.evaluation.page.curves import GROUPS, charts
from rewardsr.evaluation.page.images import LARGEST, fitted, kind_of
from rewardsr.evaluation.page.read import read_page
from rewardsr.evaluation.page.sections import cast_section, runs_section, verdict_section
from rewardsr.evaluation.page.verdict import judge
from rewardsr.storage import expand, write_text

__all__ = ["EvaluationView", "Page", "Picture", "RunView", "check_place", "read_page", "write_page"]

SCRIPTS = ("common.js", "viewer.js", "scores.js", "curves.js")
MARK = "<!-- rewardsr report -->"


def write_page(path: Path | str, page: Page, largest: int = LARGEST) -> Path:
    """Write a page as one HTML file, in one step; an earlier report there is replaced, nothing else is.

    Args:
        path: ends in .html.
        page: what it shows.
        largest: bytes that its pictures may take; see `rewardsr.evaluation.page.images.fitted`.

    Returns:
        The path.

    Raises:
        UserError: another extension, another file there, a picture or evaluation that is damaged, or the place cannot
            be written to.
    """
    path = expand(path)
    check_place(path)
    write_text(path, rendered(page, largest))
    return path


def check_place(path: Path) -> None:
    """Refuse a place where no report can go, before any work.

    Raises:
        UserError: another extension than .html, or a file there that is no report.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"cannot write '{path}': a report is HTML, let the name end in .html")
    try:
        with path.open("rb") as file:
            ours = MARK.encode() in file.read(200)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror or error}") from error
    if not ours:
        raise UserError(f"'{path}' is there and is no report of rewardsr: choose another name, or remove it")


def rendered(page: Page, largest: int = LARGEST) -> str:
    """The page as HTML."""
    pictures, kept = fitted(page.pictures, largest)
    script = "(() => {\n'use strict';\n" + "".join(_part(name) for name in SCRIPTS) + "})();\n"
    style = _part("page.css")
    verdicts = [judge(page, view) for view in page.evaluations]
    return Template(_part("template.html")).substitute(
        mark=MARK,
        policy=(
            f"default-src 'none'; script-src 'sha256-{_digest(script)}'; style-src 'sha256-{_digest(style)}'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        title=escape(page.title),
        version=escape(__version__),
        style=style,
        script=script,
        verdict=verdict_section(page, verdicts),
        cast=cast_section(page),
        runs=runs_section(page),
        kept=escape(kept),
        data=_json(_data(page, pictures, [verdict.lead for verdict in verdicts])),
    )


def _data(page: Page, pictures: list[Picture], leads: list[str]) -> dict[str, Any]:
    """What the scripts show: every picture once, whatever shares it."""
    blobs: dict[bytes, int] = {}
    for picture in pictures:
        for content in picture.images.values():
            blobs.setdefault(content, len(blobs))
    return {
        "blobs": [f"data:{kind_of(blob)};base64,{base64.b64encode(blob).decode()}" for blob in blobs],
        "pictures": [
            {
                "name": picture.name,
                "images": [[label, blobs[content]] for label, content in picture.images.items()],
                "scores": {label: _rounded(scores) for label, scores in picture.scores.items()},
            }
            for picture in pictures
        ],
        "systems": [
            {
                "name": view.name,
                "lead": lead,
                "images": distinct(view.evaluation.images),
                "metrics": [
                    [name, *([float(f"{score:.6g}") for score in scores] for scores in (pair.base, pair.tuned))]
                    for name, pair in view.evaluation.rewards.items()
                ],
            }
            for view, lead in zip(page.evaluations, leads, strict=True)
        ],
        "runs": [run.name for run in page.runs],
        "groups": GROUPS,
        "charts": charts(page.runs),
    }


def _rounded(scores: Any) -> dict[str, float]:
    return {name: float(f"{score:.6g}") for name, score in scores.items()}


def _json(content: Any) -> str:
    """JSON that no text within can end the script element of, or begin a comment in."""
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
