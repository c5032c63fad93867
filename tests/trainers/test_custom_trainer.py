"""The worked example of a training method: right by our checks and by hand, and run as a stranger's package."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rewardsr import Draws, UserError, load_adapter, lora
from rewardsr.batch import Batch
from rewardsr.options import parse
from rewardsr.plugins import names, resolve
from rewardsr.run_folder import LORA
from rewardsr.testing import check_trainer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "custom_trainer.py"


@pytest.fixture
def stranger(tmp_path, monkeypatch) -> ModuleType:
    """The example as an installed distribution that registers the trainer "relative"."""
    site = tmp_path / "site"
    about = site / "relative_sr-1.0.dist-info"
    about.mkdir(parents=True)
    (site / "relative_sr.py").write_text(EXAMPLE.read_text())
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: relative-sr\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[rewardsr.trainers]\nrelative = relative_sr:Relative\n")
    monkeypatch.syspath_prepend(site)
    yield sys.modules[resolve("trainers", "relative").__module__]
    del sys.modules["relative_sr"]


class Level:
    """A reward that is a number of our choosing times the brightness, plus another."""

    name, kind, licence = "level", "detail", "Apache-2.0"
    needs_hq, differentiable = False, False
    factor, shift = 1.0, 0.0

    def __call__(self, sr, batch):
        return self.factor * sr.mean((1, 2, 3)) + self.shift


def make(stranger, base, reward, **options):
    adapter = load_adapter("osediff", str(base), noise_t=250, net_t=100)
    lora.attach(adapter)
    chosen = parse(stranger.Relative.Options, {"group_size": 3, **options}, "options")
    return stranger.Relative(adapter, {"level": reward}, {"level": 1.0}, chosen)


def gradient(method, lq) -> torch.Tensor:
    """Of the first step on these images, with a fresh LoRA, flat; the loss comes first."""
    draws = Draws(0, 0, range(len(lq)))
    losses = list(method.losses(method.prepare(Batch(lq), draws), draws))
    for loss in losses:
        loss.value.backward()
    parts = [parameter.grad.flatten() for group in method.trained for parameter in group.parameters.values()]
    return torch.cat([torch.tensor([losses[0].metrics["loss"]]), *parts])


@pytest.fixture
def lq() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_it_is_a_trainer_of_another_package(stranger) -> None:
    assert "relative" in names("trainers")
    check_trainer(stranger.Relative, options={"group_size": 3})
    with pytest.raises(UserError, match="unknown key 'etta': did you mean 'eta'"):
        parse(stranger.Relative.Options, {"etta": 1}, "trainer_options")


def test_the_loss_by_hand(stranger) -> None:
    loss = stranger.relative_loss
    d, r = torch.tensor([[0.3, -0.1]]), torch.tensor([[1.0, 0.0]])
    assert float(loss(d, r, 1.0)) == pytest.approx(0.36, abs=1e-6)
    assert float(loss(d, r + 5, 1.0)) == pytest.approx(0.36, abs=1e-5), "only differences count"
    r = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert float(loss(2.5 * r + 3, r, 2.5)) == pytest.approx(0, abs=1e-10), "the regression has reached its target"
    pairs = [(0.3 * (r[:, i] - r[:, j])).square() for i in range(6) for j in range(i)]
    assert float(loss(torch.zeros(4, 6), r, 0.3)) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)


@pytest.mark.parametrize("eta", [1.0, 0.5])
def test_the_first_loss_is_twice_the_variance_of_what_is_asked_for(stranger, tiny_base, lq, eta) -> None:
    found = gradient(make(stranger, tiny_base, Level(), eta=eta), lq)
    assert float(found[0]) == pytest.approx(2 * eta**2, rel=1e-4)
    assert found[1:].any()


def test_the_first_gradient_is_that_of_the_rewards_alone(stranger, tiny_base, lq) -> None:
    """-(4 eta / (G - 1)) sum (r_i - mean) grad D_i, mean over the images."""
    method = make(stranger, tiny_base, Level(), eta=0.5)
    draws = Draws(0, 0, range(len(lq)))
    group = method.prepare(Batch(lq), draws)
    task = method.groups.task(group, draws)
    rows = slice(0, len(task.condition))
    d = -method.options.beta / 2 * method.groups.errors(task, rows).reshape(group.advantages.shape)
    centred = group.advantages - group.advantages.mean(1, keepdim=True)
    (-(4 * 0.5 / 2) * (centred * d).sum(1).mean()).backward()
    expected = torch.cat([p.grad.flatten() for g in method.trained for p in g.parameters.values()])
    found = gradient(make(stranger, tiny_base, Level(), eta=0.5), lq)[1:]
    assert float((found - expected).norm() / expected.norm()) < 1e-3


def test_constant_rewards_teach_nothing(stranger, tiny_base, lq) -> None:
    reward = Level()
    reward.factor = 0.0
    assert not gradient(make(stranger, tiny_base, reward), lq).any()


def test_a_constant_added_to_rewards_changes_nothing(stranger, tiny_base, lq) -> None:
    reward = Level()
    reward.shift = 0.25
    plain, shifted = (gradient(make(stranger, tiny_base, one), lq) for one in (Level(), reward))
    assert float((plain - shifted).norm() / plain.norm()) < 1e-3


def test_it_trains_by_its_name(stranger, commands, tiny_base, hq_folder, tmp_path) -> None:
    run = tmp_path / "run"
    answer = commands.finetune(tiny_base, hq_folder, run, "--trainer", "relative", "--set", "trainer_options.eta=0.5")
    assert answer.code == 0, answer.err
    assert (run / LORA).is_file() and "trainer: relative" in (run / "recipe.yaml").read_text()
    first, second = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert first["loss"] == pytest.approx(0.5, rel=1e-3) and first["grad_norm"] > 0
    assert second["loss"] != first["loss"] and second["skipped"] == 0


def test_the_readme_has_the_example_as_it_is() -> None:
    assert EXAMPLE.read_text() in (ROOT / "rewardsr" / "trainers" / "README.md").read_text()
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 50
