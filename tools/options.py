"""Writes the tables of options in the READMEs from the declarations: `python -m tools.options`.

A line `<!-- options: adapters osediff -->` stands before each table.
"""

import re
from pathlib import Path

from rewardsr import catalogue

ROOT = Path(__file__).parents[1]
READMES = ("adapters/README.md", "rewardsr/trainers/README.md")
_PLACE = re.compile(r"<!-- options: (?P<kind>\w+) (?P<name>\S+) -->\n(?:\|[^\n]*\n)*")


def written(text: str) -> str:
    """The text with every table as it should be."""

    def table(place: re.Match[str]) -> str:
        model = catalogue.options_of(place["kind"], place["name"])
        return f"<!-- options: {place['kind']} {place['name']} -->\n{catalogue.table(model)}"

    return _PLACE.sub(table, text)


if __name__ == "__main__":
    for name in READMES:
        path = ROOT / name
        path.write_text(written(path.read_text()))
