"""What `import rewardsr` offers: names that complete, have types, and cost nothing until they are used."""

import ast
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import rewardsr

ROOT = Path(__file__).parents[1]
PUBLIC = {
    *("Batch", "Condition", "Draws", "Evaluation", "ISRAdapter", "Options", "Recipe", "TrainingError", "UserError"),
    *("evaluate", "export", "finetune", "import_lora", "load_adapter", "load_lora", "push", "upscale", "wrap"),
}


def test_public_names_complete_and_can_be_had() -> None:
    assert set(dir(rewardsr)) == set(rewardsr.__all__) == PUBLIC | {"__version__"}
    for name in PUBLIC:
        assert getattr(rewardsr, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'tune'"):
        rewardsr.tune  # noqa: B018


def test_types_are_declared_where_the_names_come_from() -> None:
    tree = ast.parse((ROOT / "rewardsr" / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module != "typing"]
    declared = {alias.asname: (node.module or "") for node in imports for alias in node.names if alias.asname}
    assert declared == {name: f"rewardsr.{place}" for name, place in rewardsr._WHERE.items()}


def test_importing_and_completing_is_light() -> None:
    code = "import sys, rewardsr; dir(rewardsr); rewardsr.UserError; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


CONSUMER = """
from pathlib import Path
from PIL import Image
import rewardsr

adapter = rewardsr.load_adapter("osediff", "base", noise_t=250)
reveal_type(adapter)
reveal_type(rewardsr.upscale(adapter, "photo.png"))
reveal_type(rewardsr.upscale(adapter, [Image.new("RGB", (8, 8)), "photo.png"], Path("out"), seed=1))
reveal_type(rewardsr.evaluate(adapter, "held_out"))
reveal_type(rewardsr.evaluate(adapter, "held_out").rewards["psnr"].difference)
try:
    rewardsr.finetune("recipe.yaml")
except (rewardsr.UserError, rewardsr.TrainingError) as error:
    reveal_type(error)
"""
REVEALED = [
    "rewardsr.adapter.ISRAdapter",
    "list[PIL.Image.Image]",
    "list[pathlib.Path]",
    "rewardsr.evaluation.report.Evaluation",
    "float",
    "rewardsr.errors.UserError | rewardsr.errors.TrainingError",
]
# Libraries are skipped: whether rewardsr shows its own types is asked here, and torch's would take a minute.
CONFIG = """
[mypy]
strict = True
follow_imports = silent
allow_subclassing_any = True
[mypy-torch.*,torchvision.*,diffusers.*,transformers.*,peft.*,accelerate.*,kornia.*,pyiqa.*,numpy.*,huggingface_hub.*]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.mark.skipif(find_spec("mypy") is None, reason="mypy is not installed")
def test_type_checkers_see_the_types(tmp_path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "consumer.py"],
        env={"MYPYPATH": str(ROOT), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    revealed = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert [kind.replace("builtins.", "") for kind in revealed] == REVEALED


def test_only_the_console_prints() -> None:
    files = [path for path in (ROOT / "rewardsr").rglob("*.py") if path.name != "console.py"]
    assert len(files) > 30
    assert [str(path) for path in files if re.search(r"(?<![.\w])print\(", path.read_text())] == []
