"""The layout of the package holds: floors, no import circle, sizes of files and functions, and a light command line."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From low to high; an entry stands for the module or package and what is in it, unless a longer entry names that.
# A module imports from its own floor or lower ones only.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "run_folder", "options", "outline", "places", "checks", "transfer"),
    (
        *("plugins", "storage", "json_object", "draws", "hub.connection"),
        *("console", "progress", "interrupts", "together", "pooling", "versions", "ending"),
    ),
    (
        *("weights", "schedule", "tiling", "sizes", "batch", "hub.fetch", "hub.outline"),
        *("train.recipe", "train.recipe_guards", "train.recipe_learning", "train.recipe_text"),
    ),
    ("adapter",),
    ("lora", "data", "rewards"),
    ("adapters", "trainers"),
    ("pipelines", "catalogue"),
    ("evaluation",),
    ("train", "hub"),
    ("testing", "demo", "doctor", "cli", "", "__main__"),
)

# Where a function may import a module of the package, and why; an entry stands for what is in a package, too.
LAZY = {
    "cli": "answers --help without importing what the commands need",
    "__init__": "`import rewardsr` is light; public names are imported when they are first used",
    "lora.layers": "peft takes a second to import, and commands of the Hub need it not",
    "adapters.stablesr": "its networks import those of diffusers, which takes seconds: listing adapters need not",
    "adapters._stablesr_checkpoint": "as adapters.stablesr",
}

LONGEST_FILE, LONGEST_FUNCTION = 400, 80


def module_of(path: Path) -> str:
    """Dotted name of a module within the package: "train.loop"; "" is the package itself."""
    place = path.relative_to(ROOT / "rewardsr") if path.is_relative_to(ROOT / "rewardsr") else path.relative_to(ROOT)
    return ".".join(place.with_suffix("").parts).removesuffix("__init__").rstrip(".")


FILES = {module_of(path): path for folder in ("rewardsr", "adapters") for path in sorted((ROOT / folder).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Every import, and whether it stands in a function; not those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, inside
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Modules of the package that an import names; of `from package import module`, the module alone."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: imports are absolute here"
        named = [f"{node.module}.{alias.name}" for alias in node.names]
        # A constant of the package's own __init__, which has run before any of its modules is imported.
        named = [name for name in named if name != "rewardsr.__version__"]
        named = [name if name.removeprefix("rewardsr.") in FILES else str(node.module) for name in named]
    else:
        named = [alias.name for alias in node.names]
    for name in named:
        if name == "rewardsr" or name.startswith("rewardsr."):
            yield name.removeprefix("rewardsr").removeprefix(".")


GRAPH = {
    name: {(target, node.lineno, inside) for node, inside in imports(tree) for target in targets(node)}
    for name, tree in TREES.items()
}


def floor_of(module: str) -> int:
    """Number of the floor that a module belongs to."""
    entry = module
    while entry or not module:
        for number, entries in enumerate(FLOORS):
            if entry in entries:
                return number
        entry = entry.rpartition(".")[0]
    raise AssertionError(f"{module} has no floor: give it one in FLOORS")


def test_every_entry_of_the_floors_is_there() -> None:
    gone = [entry for entries in FLOORS for entry in entries if entry not in FILES]
    assert not gone, f"{gone} are no modules: leave them out of FLOORS"


def within(name: str, entries: Iterable[str]) -> bool:
    """Whether a module is one of the entries, or in one."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in entries)


def test_no_module_imports_from_a_higher_floor() -> None:
    wrong = [
        f"{FILES[name].relative_to(ROOT)}:{line} ({floor_of(name)}) imports {target or 'rewardsr'} ({floor_of(target)})"
        for name, found in GRAPH.items()
        for target, line, _ in sorted(found)
        if floor_of(target) > floor_of(name)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_there_is_no_import_circle() -> None:
    left = {name: {target for target, _, _ in found} - {name} for name, found in GRAPH.items()}
    while free := [name for name, found in left.items() if not found & left.keys()]:
        for name in free:
            del left[name]
    # What only imports a circle, without being in one, is of no interest.
    while outer := [name for name in left if not any(name in found for found in left.values())]:
        for name in outer:
            del left[name]
    assert not left, f"these import each other: {', '.join(sorted(left))}"


def test_functions_import_the_package_only_where_there_is_a_reason() -> None:
    wrong = [
        f"{FILES[name].relative_to(ROOT)}:{line} imports {target}"
        for name, found in GRAPH.items()
        for target, line, inside in sorted(found)
        if inside and not within(name or "__init__", LAZY)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_reasons_for_late_imports_are_still_needed() -> None:
    late = {name or "__init__" for name, found in GRAPH.items() if any(inside for _, _, inside in found)}
    dynamic = {"__init__"}  # imports by name, which `ast` does not see
    idle = {entry for entry in LAZY if not any(within(name, [entry]) for name in late | dynamic)}
    assert not idle, f"{idle} import nothing late: leave them out of LAZY"


def test_adapters_do_not_import_each_other() -> None:
    shared = ("adapters.stable_diffusion", "adapters._")  # the public base of SD-shaped families, and helper files
    wrong = [
        f"{name} imports {target}"
        for name, found in GRAPH.items()
        for target, _, _ in sorted(found)
        if name.startswith("adapters.") and target.startswith("adapters.") and not target.startswith(shared)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", FILES, ids=lambda name: name or "rewardsr")
def test_files_and_functions_are_short(name) -> None:
    assert len(FILES[name].read_text().splitlines()) <= LONGEST_FILE
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_help_loads_neither_torch_nor_diffusers() -> None:
    script = (
        "import sys; sys.argv = ['rewardsr', '--help']\n"
        "from rewardsr import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as left:\n    assert not left.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'peft', 'accelerate', 'pyiqa'} & set(sys.modules)\n"
        "sys.exit(f'--help loads {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "finetune" in done.stdout
