"""The documents are where they say: links lead to files and headings that are there, and the first page stays one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for folder in (".", "docs", "adapters", "rewardsr") for path in sorted((ROOT / folder).glob("*.md"))]
DOCUMENTS += sorted((ROOT / "rewardsr").glob("*/README.md"))
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(path: Path) -> set[str]:
    """What a link can name of a document: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path) -> None:
    for name, anchor in LINK.findall(path.read_text()):
        target = path.parent / name if name else path
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_the_readme_is_for_newcomers_and_names_every_other_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 300
    unnamed = [path.name for path in (ROOT / "docs").iterdir() if f"](docs/{path.name}" not in text]
    assert not unnamed, unnamed
