"""What a user installs: complete wheels, a quick command, and nothing that needs pyiqa unless it is asked for."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "peft", "pyiqa", "kornia")


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, cwd: Path, **env: str) -> str:
    """Output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- start-up -------------------------------------------------------------------------------------


def test_help_is_quick(tmp_path):
    script = shutil.which("rewardsr", path=sysconfig.get_path("scripts"))
    assert script, "the rewardsr command is not installed beside this interpreter"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([script, "--help"], cwd=tmp_path, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5, f"rewardsr --help took {', '.join(f'{t:.2f}' for t in times)} s"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["finetune", "--help"]])
def test_help_imports_nothing_heavy(arguments, tmp_path):
    loaded = python(
        f"""if True:
        import sys
        from rewardsr.cli import main
        sys.argv = ["rewardsr", *{arguments}]
        try:
            main()
        except SystemExit as stop:
            assert not stop.code, stop.code
        print("LOADED", *[name for name in {HEAVY} if name in sys.modules])
        """,
        tmp_path,
    )
    assert loaded.splitlines()[-1] == "LOADED"


# --- what is shipped ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Folder with a wheel and an sdist, made from a copy: a build leaves files in the tree it runs in."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for folder in ("rewardsr", "adapters"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # The backend that pip would call, without the isolation that would download it.
    build = f"from setuptools import build_meta as b; out = {str(built)!r}; b.build_sdist(out); b.build_wheel(out)"
    python(build, source)
    return built


def shipped_files() -> set[str]:
    """Every file of the packages but the Markdown, by its path in a wheel."""
    files = {p.relative_to(ROOT) for folder in ("rewardsr", "adapters") for p in (ROOT / folder).rglob("*")}
    kept = {f for f in files if (ROOT / f).is_file() and "__pycache__" not in f.parts and f.suffix != ".md"}
    return {re.sub("^adapters/", "rewardsr/adapters/", f.as_posix()) for f in kept}


def test_wheel_is_complete(built):
    [wheel] = built.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"rewardsr/py.typed", "rewardsr/adapters/osediff.py", "rewardsr/demo/pipeline/model_index.json"} <= held
    assert "rewardsr/hub/card.md" in held
    assert any(name.startswith("rewardsr/demo/pipeline/") and name.endswith(".safetensors") for name in held)
    assert shipped_files() - held == set(), "missing in the wheel: see packages and package-data in pyproject.toml"
    assert not any(name.startswith(("adapters/", "tests/", "examples/")) for name in held)
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_sdist_is_complete(built):
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {re.sub("^rewardsr/adapters/", "adapters/", name) for name in shipped_files()} - held == set()
    assert {"pyproject.toml", "LICENSE", "README.md"} <= held


def test_wheel_imports_without_the_source_tree(built, tmp_path):
    [wheel] = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import rewardsr, rewardsr.adapters as a; print(rewardsr.__file__, a.__file__, sep='\\n')"
    where = python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).split("\n")
    assert [str(Path(w).parent) for w in where[:2]] == [
        str(tmp_path / "site/rewardsr"),
        str(tmp_path / "site/rewardsr/adapters"),
    ]


def test_entry_points_name_files_that_are_shipped(pyproject):
    groups = pyproject["project"]["entry-points"]
    kinds = ("adapters", "captioners", "degradations", "rewards", "trainers")
    assert set(groups) == {f"rewardsr.{kind}" for kind in kinds}
    modules = {value.partition(":")[0] for group in groups.values() for value in group.values()}
    assert {f"{module.replace('.', '/')}.py" for module in modules} - shipped_files() == set()


def test_pins_lie_within_the_ranges(pyproject):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]  # a URL or option is no pin
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(pin.url is None and str(pin.specifier).startswith("==") for pin in pins)
    project = pyproject["project"]
    for wanted in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        name = canonicalize_name(wanted.name)
        assert name in versions, f"{name} is not pinned in constraints.txt"
        assert wanted.specifier.contains(versions[name]), f"{wanted} does not allow {versions[name]}"


# --- without pyiqa --------------------------------------------------------------------------------

WITHOUT_PYIQA = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.split(".")[0] == "pyiqa" else find(name, path, target)
)
try:
    import pyiqa
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("pyiqa was not hidden")
"""


def test_built_in_rewards_are_listed_and_work_without_pyiqa(pyproject, tmp_path):
    names = list(pyproject["project"]["entry-points"]["rewardsr.rewards"])
    use = f"""
import torch
from rewardsr.batch import Batch
from rewardsr.cli import main
from rewardsr.rewards import build

image = torch.rand(2, 3, 32, 32)
batch = Batch(lq=torch.rand(2, 3, 8, 8), hq=image, prompts=("", ""))
for name in {[name for name in names if name != "imagereward"]}:  # which needs weights
    assert build(name)(image, batch).shape == (2,), name
sys.argv = ["rewardsr", "rewards"]
main()
"""
    listed = python(WITHOUT_PYIQA + use, tmp_path)
    for name in names:
        assert re.search(rf"^\W*{name}\b", listed, re.MULTILINE), listed
