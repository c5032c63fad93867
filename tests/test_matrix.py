"""Every trainer with every adapter that comes along: a short real run each, from the recipe to the LoRA in use."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from _matrix import CROP, ROWS, STEPS, TRAINERS, Row, bases, recipe
from _support import snapshot
from safetensors.torch import load_file
from torch import Tensor, nn

import rewardsr
from rewardsr import Draws, UserError, load_adapter, lora, run_folder
from rewardsr.data.degrade.contract import make_degradation
from rewardsr.data.folder import open_data
from rewardsr.options import parse
from rewardsr.plugins import names
from rewardsr.train import finetune
from rewardsr.train.prepare import Setup, method_class
from rewardsr.train.recipe import DegradationRecipe

PAIRS = [(trainer, row) for trainer in TRAINERS for row in ROWS if trainer not in row.refused_by]
REFUSED = [(trainer, row) for row in ROWS for trainer in row.refused_by]


def label(value: Any) -> str:
    return value.name if isinstance(value, Row) else value


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    return bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def used(monkeypatch) -> list[Setup]:
    """What the runs of a test worked with; they work as ever."""
    found: list[Setup] = []
    real = finetune.set_up

    def noted(recipe: Any) -> Setup:
        found.append(real(recipe))
        return found[-1]

    monkeypatch.setattr(finetune, "set_up", noted)
    return found


def test_every_built_in_adapter_and_trainer_has_its_place_in_the_matrix() -> None:
    without = sorted(set(names("adapters")) - {row.adapter for row in ROWS})
    assert not without, f"adapters {without} are trained by no test: give each a row in tests/_matrix.py"
    without = sorted(set(names("trainers")) - set(TRAINERS))
    assert not without, f"trainers {without} train nothing in the tests: give each its options in tests/_matrix.py"


@pytest.mark.parametrize(("trainer", "row"), PAIRS, ids=label)
def test_a_run_leaves_a_lora_that_works(trainer, row, folders, used, tmp_path) -> None:
    base = folders[row.base]
    content = recipe(row, trainer, base, tmp_path)
    before = snapshot(Path(base))
    result = rewardsr.finetune(content)
    assert result.finished and result.step == STEPS
    check_log(trainer, row, result.output, len(used[0].adapter.steps))
    for name in ("detail", "psnr"):
        assert all(math.isfinite(result.validation[name][key]) for key in ("base_mean", "tuned_mean"))
    assert any(entry["difference"] != 0 for entry in result.validation.values()), "the LoRA was off at validation"
    fresh = load_adapter(row.adapter, base, **row.options)
    check_base(used[0].adapter, fresh)
    assert snapshot(Path(base)) == before
    check_lora(result.output, fresh, content)
    check_output(result.output, load_adapter(row.adapter, base, **row.options), content)


@pytest.mark.parametrize(("trainer", "row"), REFUSED, ids=label)
def test_what_a_trainer_cannot_train_is_refused_in_one_line(trainer, row, folders, tmp_path) -> None:
    with pytest.raises(UserError, match=row.refused_by[trainer]) as caught:
        rewardsr.finetune(recipe(row, trainer, folders[row.base], tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def check_log(trainer: str, row: Row, run: Path, sampler: int) -> None:
    """All steps are finite, none was skipped, and RFSR saw both ends of the schedule."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "validation" not in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert isinstance(line["loss"], float) and line["grad_norm"] > 0 and line["skipped"] == 0, line
    if trainer == "gdpo":
        assert min(line["group/pixel_std"] for line in steps) > 0
        return
    if trainer == "naosd":
        assert min(line[f"loss/{term}"] for line in steps for term in ("mse", "vsd", "fake")) > 0
        return
    shares = [(line["share/structure"], line["share/reward"]) for line in steps]
    if sampler == 1:
        assert set(shares) == {(1, 1)}, "a single step is early and late"
    else:
        assert shares == [(1, 0), (0, 1), (0.5, 0.5)], "choose another seed: the windows should be drawn apart"
    for line in steps:
        for share, term in (("structure", "structure"), ("reward", "detail"), ("kl", "kl")):
            if line[f"share/{share}"] == 0:
                assert line[f"loss/{term}"] == 0, line
            elif term != "kl":
                assert line[f"loss/{term}"] > 0, line
    # The first step compares the untuned pipeline with itself.
    assert any(line["loss/kl"] > 0 for line in steps[1:]), "no style term"


def frozen(adapter: rewardsr.ISRAdapter) -> dict[str, Tensor]:
    """Every tensor of every network but those of our LoRA, by its name without one."""
    networks = {name: value for name, value in vars(adapter).items() if isinstance(value, nn.Module)}
    assert len(networks) > len(adapter.networks), "the text encoder, too"
    return {
        f"{component}.{name.replace('.base_layer.', '.')}": value
        for component, network in networks.items()
        for name, value in network.state_dict().items()
        if ".lora_" not in name
    }


def check_base(trained: rewardsr.ISRAdapter, fresh: rewardsr.ISRAdapter) -> None:
    """Training has changed nothing but the LoRA."""
    one, other = frozen(trained), frozen(fresh)
    assert one.keys() == other.keys()
    changed = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not changed, changed[:3]


def check_lora(run: Path, adapter: rewardsr.ISRAdapter, content: dict[str, Any]) -> None:
    """The LoRA of the run is finite, and has left the start that its seed gives it in every part of the pipeline."""
    tensors = load_file(run / run_folder.LORA)
    kind = method_class(content["trainer"])
    targets = kind.lora_targets(adapter, parse(kind.Options, content["trainer_options"], "options"))
    lora.attach(adapter, seed=content["seed"], targets=targets)
    start = lora.state_dict(adapter)
    assert tensors.keys() == start.keys()
    assert all(value.isfinite().all() for value in tensors.values())
    for component in targets:
        own = [name for name in tensors if name.startswith(f"{component}.")]
        still = [name for name in own if ".lora_B." in name and torch.equal(tensors[name], start[name])]
        assert own and not still, f"{component}: {len(still)} of {len(own)} tensors did not move: {still[:3]}"


@torch.no_grad()
def check_output(run: Path, adapter: rewardsr.ISRAdapter, content: dict[str, Any]) -> None:
    """The LoRA loads into a fresh pipeline and changes what that makes of an image; without it, nothing has changed."""
    images = content["data"]["train"]
    degradation = make_degradation(DegradationRecipe(), adapter.scale)
    data = open_data(images, scale=adapter.scale, crop=CROP, degradation=degradation, extras=adapter.extras)
    batch = data.batch(0, [0])

    def sample() -> Tensor:
        draws = Draws(0, 0, [0])
        return adapter.sample(adapter.encode(batch, generator=draws), draws)

    before = sample()
    lora.load(adapter, run)
    after = sample()
    assert after.shape == before.shape == batch.hq.shape and after.isfinite().all()
    assert float((after - before).abs().max()) > 1e-5
    with lora.reference(adapter):
        assert torch.equal(sample(), before)
