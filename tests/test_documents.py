"""The documents are where they say: links lead to files and headings that are there, and the first page stays one."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLACES = ("adapters", "rewardsr/*", "tests", "tests/benchmarks")
PAGES = [path for place in PLACES for path in sorted(ROOT.glob(f"{place}/README.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")


def anchors(path: Path) -> set[str]:
    """What a link can name of a document: its headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("*.md")), *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path) -> None:
    for name, anchor in LINK.findall(path.read_text()):
        target = path.parent / name if name else path
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_the_readme_is_for_newcomers_and_names_every_other_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 300
    unnamed = [name for path in PAGES if f"]({(name := str(path.relative_to(ROOT)))}" not in text]
    assert len(PAGES) == 8 and not unnamed, unnamed
