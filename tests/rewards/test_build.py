"""Rewards by name: built-in, pyiqa's, and somebody else's."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from rewardsr import plugins
from rewardsr.batch import Batch
from rewardsr.errors import UserError
from rewardsr.rewards import Known, build, iqa, known
from rewardsr.rewards.base import Reward
from rewardsr.rewards.detail import Sharpness
from rewardsr.rewards.fidelity import PSNR

NEED_WEIGHTS = {"imagereward"}  # which tests write for themselves

CUSTOM = """
    from rewardsr.options import Options

    class BrightnessOptions(Options):
        goal: float = 0.5

    class Brightness:
        name, kind, licence = "brightness", "detail", "MIT"
        differentiable, needs_hq = True, False
        Options = BrightnessOptions

        def __init__(self, options: BrightnessOptions) -> None:
            self.goal = options.goal

        def __call__(self, sr, batch):
            return -(sr.mean((1, 2, 3)) - self.goal).abs()

    def bright() -> Brightness:
        return Brightness(BrightnessOptions(goal=0.75))

    def needing(goal: float) -> Brightness: ...

    class Undeclared(Brightness):
        Options = None

    class Loose(Brightness):
        Options = dict

    class Twofold(Brightness):
        def __init__(self, options: BrightnessOptions, device: str = "cpu") -> None: ...

    class Failing(Brightness):
        def __init__(self, options: BrightnessOptions) -> None:
            raise OSError("no such\\ndisk")

    class NoKind:
        name, licence, differentiable, needs_hq = "x", "MIT", True, False
        def __call__(self, sr, batch): ...

    class OddKind(Brightness):
        kind = "beauty"

    ready = bright()
    number = 3
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(CUSTOM))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


@pytest.mark.parametrize("name", [name for name in plugins.names("rewards") if name not in NEED_WEIGHTS])
def test_built_ins_are_rewards(name: str) -> None:
    reward = build(name)
    assert isinstance(reward, Reward)
    assert reward.name == name
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert reward(images, Batch(lq=images, hq=images)).shape == (2,)


def test_built_ins_come_first() -> None:
    assert isinstance(build("psnr"), PSNR)
    assert isinstance(build("iqa:psnr"), iqa.IQA)
    assert build("iqa:psnr").name == "iqa:psnr"


def test_pyiqa_ids_need_no_prefix() -> None:
    reward = build("piqe")
    assert isinstance(reward, iqa.IQA)
    assert reward.name == build("iqa:piqe").name == "piqe"
    assert build("psnry", color_space="ycbcr").name == "psnry"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pnsr", {}, "unknown reward 'pnsr': did you mean 'psnr'"),
        ("musik", {}, "unknown reward 'musik': did you mean 'musiq'"),
        ("sharpnes", {}, "'sharpness'"),
        ("qqqqqq", {}, "known: clipping, color_shift, detail, detail_correlation, high_frequency, "),
        ("iqa:musik", {}, "pyiqa has no metric 'musik': did you mean 'musiq'"),
        ("psnr", {"crop": 4}, "options of reward 'psnr': unknown key 'crop': known: none"),
        ("piqe", {"crop": 4}, "metric 'piqe' has no option 'crop'"),
        ("imagereward", {"antialais": True}, "unknown key 'antialais': did you mean 'antialias'?"),
        ("my_rewards:Brightness", {"gaol": 0.2}, "unknown key 'gaol': did you mean 'goal'?"),
        ("my_rewards:Brightness", {"goal": "high"}, "options of reward 'my_rewards:Brightness': 'goal' is 'high'"),
        ("my_rewards:Brightness", {"goal": float("nan")}, "'goal' is nan"),
        ("my_rewards:bright", {"goal": 0.2}, "options of reward 'my_rewards:bright': unknown key 'goal': known: none"),
        ("my_rewards:needing", {"goal": 0.2}, "takes the arguments (goal): expected none, or one, whose class"),
        ("my_rewards:Undeclared", {}, "takes the arguments (options): expected none, or one, whose class the reward"),
        ("my_rewards:Twofold", {}, "takes the arguments (options, device)"),
        ("my_rewards:Loose", {}, "declare its Options as a subclass of rewardsr.Options"),
        ("my_rewards:Failing", {}, "reward 'my_rewards:Failing' cannot be made: OSError: no such disk"),
        ("builtins:int", {}, "what it makes lacks name, kind"),
        ("my_rewards:NoKind", {}, "what it makes lacks kind"),
        ("my_rewards:OddKind", {}, "kind must be one of fidelity, detail, not 'beauty'"),
        ("my_rewards:ready", {}, "expected a class or a function that makes a reward, got Brightness"),
        ("my_rewards:number", {}, "got int"),
        ("my_rewards:Nothing", {}, "module my_rewards has no 'Nothing'"),
        ("no_such_module:Name", {}, "importing no_such_module failed"),
    ],
)
@pytest.mark.usefixtures("custom")
def test_mistakes(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "options"), [("my_rewards:Brightness", {"goal": 0.75}), ("my_rewards:bright", {})])
@pytest.mark.usefixtures("custom")
def test_rewards_of_others(name: str, options: dict[str, Any]) -> None:
    reward = build(name, **options)
    scores = reward(torch.full((2, 3, 4, 4), 0.5), Batch(lq=torch.zeros(2, 3, 4, 4)))
    assert scores.tolist() == [-0.25, -0.25]


def test_table() -> None:
    rows = {row.name: row for row in known()}
    assert list(rows) == plugins.names("rewards")
    assert rows["psnr"] == Known("psnr", "fidelity", True, True, "Apache-2.0")
    assert rows["imagereward"] == Known("imagereward", "detail", False, True, "Apache-2.0")
    assert rows["perceptual"] == Known("perceptual", "fidelity", True, True, "Apache-2.0")
    assert rows["sharpness"] == Known("sharpness", "detail", False, True, "Apache-2.0")


def test_table_outlives_a_broken_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(kind: str, name: str) -> Any:
        if name == "broken":
            raise UserError("reward 'broken': importing broken failed")
        return {"made": lambda: Sharpness()}.get(name, Sharpness)

    monkeypatch.setattr(plugins, "names", lambda kind: ["broken", "made", "plain"])
    monkeypatch.setattr(plugins, "resolve", resolve)
    broken, made, plain = known()
    assert broken.kind == "?"
    assert "importing broken failed" in broken.licence
    assert made[1:] == plain[1:] == ("detail", False, True, "Apache-2.0")


def test_without_pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    iqa.metrics.cache_clear()
    assert len(known()) == len(plugins.names("rewards"))
    assert isinstance(build("psnr"), PSNR)
    with pytest.raises(UserError, match="with pyiqa installed, one of its ids"):
        build("musiq")
    with pytest.raises(UserError, match="pip install pyiqa"):
        build("iqa:musiq")
    iqa.metrics.cache_clear()


def test_names_and_table_do_not_import_pyiqa() -> None:
    code = """
        import sys
        from rewardsr.errors import UserError
        from rewardsr.rewards import build, known
        known(), build("psnr")
        try:
            build("musik")
        except UserError as error:
            assert "musiq" in str(error), error
        assert not {"pyiqa", "timm", "transformers", "torchvision"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
