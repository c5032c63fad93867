"""The constant-offset control: it finds what a LoRA adds everywhere, and nothing else."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from _support import Commands, snapshot
from torch import Tensor

import rewardsr
from rewardsr import Batch, Draws, Evaluation, UserError, load_adapter, lora, progress
from rewardsr.adapter import ISRAdapter
from rewardsr.evaluation.comparison import interval
from rewardsr.evaluation.offset import Offset, latent_offset, shifted
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.evaluation.report import side_by_side
from rewardsr.rewards import build

ADDED = torch.tensor([0.3, -0.1, 0.2, 0.0])


@pytest.fixture
def adapter(tiny_base):
    return load_adapter("osediff", str(tiny_base), noise_t=250)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base, hq_folder) -> Path:
    """Folder of a finished run of two steps; read only."""
    folder = tmp_path_factory.mktemp("run") / "run"
    rewardsr.finetune(
        {
            "base": str(tiny_base),
            "adapter_options": {"noise_t": 250},
            "trainer_options": {"group_size": 2},
            "rewards": [{"name": "psnr"}],
            "data": {"train": str(hq_folder), "crop": 32},
            "optimiser": {"learning_rate": 0.01},
            "output": str(folder),
            "steps": 2,
            "device": "cpu",
        }
    )
    return folder


def images(count: int = 2) -> list[Batch]:
    random = torch.Generator().manual_seed(4)
    pixels = [torch.rand(1, 3, 32, 32, generator=random) for _ in range(count)]
    return [Batch(lq=torch.nn.functional.avg_pool2d(hq, 4), hq=hq) for hq in pixels]


def scored(adapter: ISRAdapter, offset: Offset | None = None, draws: int = 1) -> Evaluation:
    rewards = {name: build(name) for name in ("psnr", "detail")}
    held_out = HeldOut(adapter, lambda first, every: images(3)[first::every], rewards, draws_per_image=draws)
    return held_out.score(offset=offset)


def latents(adapter: ISRAdapter, batch: Batch, seed: int = 0, draw: int = 0, place: int = 0) -> Tensor:
    draws = Draws(seed, draw, [place], "offset")
    condition = adapter.encode(batch, generator=draws if adapter.noisy_condition else None)
    return adapter.sample_latents(condition, draws)


@torch.no_grad()
def moved(adapter: ISRAdapter) -> ISRAdapter:
    """With a LoRA that does something."""
    if not lora.attached(adapter):
        lora.attach(adapter)
    random = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(adapter).values():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    return adapter


@contextmanager
def predicting_more(adapter: ISRAdapter, more: Callable[[Tensor], Tensor]):
    """Inside, a LoRA that is on adds something known to the prediction, and by that to x0."""
    lora.attach(adapter)
    plain = type(adapter)._predict

    def predict(self, z_t, t, condition):
        found = plain(self, z_t, t, condition)
        return found + more(found) if lora.active(self) else found

    type(adapter)._predict = predict
    try:
        yield
    finally:
        type(adapter)._predict = plain


def on_a_constant(found: Tensor) -> Tensor:
    return ADDED[:, None, None].expand_as(found)


def on_a_checkerboard(found: Tensor) -> Tensor:
    rows, columns = (torch.arange(length) for length in found.shape[-2:])
    return on_a_constant(found) * (1 - 2 * ((rows[:, None] + columns) % 2))


def test_it_is_the_mean_change_of_the_latents(adapter, capfd, monkeypatch) -> None:
    lora.attach(adapter)
    assert torch.equal(latent_offset(adapter, images(), "two").numbers, torch.zeros(4)), "a fresh LoRA changes nothing"
    moved(adapter)
    expected = []
    for place, batch in enumerate(images()):
        for draw in range(3):
            tuned = latents(adapter, batch, 7, draw, place)
            with lora.reference(adapter):
                expected.append((tuned - latents(adapter, batch, 7, draw, place)).mean((0, 2, 3)))
    monkeypatch.setattr(progress, "SELDOM", 0)
    found = latent_offset(adapter, images(), "two", count=2, seed=7, draws_per_image=3)
    told = [line.split("  ")[0] for line in capfd.readouterr().err.splitlines()]
    assert told == ["cast test: offset 1/2", "cast test: offset 2/2"]
    assert found.measured_on == "two" and found.numbers.abs().min() > 1e-4
    assert torch.allclose(found.numbers, torch.stack(expected).mean(0), atol=1e-6)
    one = latent_offset(adapter, images(), "two", seed=7).numbers
    assert torch.allclose(one, torch.stack(expected[::3]).mean(0), atol=1e-6) and not torch.equal(one, found.numbers)


def test_a_pipeline_of_several_steps_is_judged_by_what_it_decodes(tmp_path) -> None:
    rewardsr.testing.tiny_pipeline(tmp_path / "flow", family="flow")
    adapter = moved(load_adapter("rewardsr.testing.flow:TinyFlow", str(tmp_path / "flow")))
    assert len(adapter.steps) > 1
    expected = []
    for place, batch in enumerate(images()):
        tuned = latents(adapter, batch, place=place)
        with lora.reference(adapter):
            expected.append((tuned - latents(adapter, batch, place=place)).mean((0, 2, 3)))
    found = latent_offset(adapter, images(), "two")
    assert found.numbers.abs().max() > 1e-4
    assert torch.allclose(found.numbers, torch.stack(expected).mean(0), atol=1e-5)
    cast = scored(adapter, found, draws=2).cast
    assert cast is not None and cast.rewards["psnr"].alone.differences != cast.rewards["psnr"].gain.differences


def test_a_change_that_is_constant_is_all_of_the_gain(adapter) -> None:
    """As the bias of a network's last convolution is: a constant of the prediction, and so of x0."""
    with predicting_more(adapter, on_a_constant):
        before = latents(adapter, images()[0], place=5)
        with lora.reference(adapter):
            before -= latents(adapter, images()[0], place=5)
        offset = latent_offset(adapter, images(), "two")
        assert torch.allclose(before, offset.numbers[:, None, None].expand_as(before), atol=1e-5)
        assert offset.numbers.abs().max() > 0.05
        found = scored(adapter, offset, draws=2)
    assert found.cast is not None and found.cast.measured_on == "two"
    for name, test in found.cast.rewards.items():
        assert test.gain == found.rewards[name] and abs(test.gain.difference) > 1e-3
        assert test.share == pytest.approx(1, abs=0.01)
        assert test.alone.tuned == pytest.approx(test.gain.tuned, abs=1e-3)
        assert test.without.differences == pytest.approx((0, 0, 0), abs=1e-3)
        assert test.beyond.differences == pytest.approx((0, 0, 0), abs=1e-3)


def test_a_change_without_a_mean_is_none_of_the_gain(adapter) -> None:
    with predicting_more(adapter, on_a_checkerboard):
        offset = latent_offset(adapter, images(), "two")
        assert torch.allclose(offset.numbers, torch.zeros(4), atol=1e-6)
        found = scored(adapter, offset)
    assert found.cast is not None
    assert found.cast.rewards["psnr"].share == pytest.approx(0, abs=0.01)
    for test in found.cast.rewards.values():
        assert max(map(abs, test.gain.differences)) > 2e-3
        assert test.alone.differences == pytest.approx((0, 0, 0), abs=1e-3)
        assert test.without.tuned == pytest.approx(test.gain.tuned, abs=1e-3)


def test_scores_are_those_of_images_decoded_by_hand(adapter) -> None:
    moved(adapter)
    offset, draws = Offset(0.5 * ADDED, "nothing"), 2
    found = scored(adapter, offset, draws)
    plain = scored(adapter, None, draws)
    assert plain.cast is None and plain.rewards == found.rewards, "the test changes no other figure"
    assert found.cast is not None
    alone, without = [], []
    psnr = build("psnr")
    with torch.no_grad():
        for place, batch in enumerate(images(3)):
            scores = []
            for draw in range(draws):
                sides = []
                for tuned in (False, True):
                    with lora.only(adapter, *["rewardsr"][: int(tuned)]):
                        condition = adapter.encode(batch)
                        z0 = adapter.sample_latents(condition, Draws(0, draw, [place], "evaluate"))
                        z0 = z0 + (-1 if tuned else 1) * offset.numbers[:, None, None]
                        sides.append(float(psnr(adapter.decode(z0, condition), batch)))
                scores.append(sides)
            alone.append(sum(side for side, _ in scores) / draws)
            without.append(sum(side for _, side in scores) / draws)
    test = found.cast.rewards["psnr"]
    assert test.alone.tuned == pytest.approx(alone, abs=1e-4) and test.without.tuned == pytest.approx(without, abs=1e-4)
    assert test.alone.base == test.without.base == test.gain.base and test.beyond.base == test.alone.tuned
    differences = [one - other for one, other in zip(test.gain.tuned, test.alone.tuned, strict=True)]
    assert (test.beyond.low, test.beyond.high) == interval(differences) and test.beyond.tuned == test.gain.tuned


def test_shifted_decodes_what_was_added_and_stops(adapter) -> None:
    condition = adapter.encode(images()[0])
    z0 = adapter.sample_latents(condition, Draws(0, 0, [0]))
    plain, moved = adapter.decode(z0, condition), adapter.decode(z0 + ADDED[:, None, None], condition)
    assert not torch.equal(plain, moved)
    with shifted(adapter, ADDED):
        assert torch.equal(adapter.sample(condition, Draws(0, 0, [0])), moved)
    assert torch.equal(adapter.decode(z0, condition), plain)
    assert "decode" not in vars(adapter)


def test_beside_the_others_in_one_table(adapter) -> None:
    found = scored(moved(adapter), Offset(ADDED, "nothing"))
    assert found.cast is not None
    alone = {name: test.alone for name, test in found.cast.rewards.items()}
    lines = side_by_side(found, {"tuned": found.rewards, "constant offset": alone}).splitlines()
    assert lines[0].split() == ["reward", "base", "tuned", "constant", "offset"]
    assert lines[1].count("[") == 2 and f"{alone['psnr'].difference:+.4f}" in lines[1]
    assert len(lines) == 4 and lines[3].startswith("3 images")


def test_it_needs_a_lora_and_images(adapter, hq_folder, tmp_path) -> None:
    with pytest.raises(UserError, match="carries none"):
        latent_offset(adapter, images(), "two")
    with pytest.raises(UserError, match="no system carries one"):
        rewardsr.evaluate(adapter, hq_folder, cast=True)
    lora.attach(adapter)
    with pytest.raises(UserError, match="there are none"):
        latent_offset(adapter, [], "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        rewardsr.evaluate(adapter, hq_folder, cast=tmp_path / "empty")


def test_what_cannot_be_scored_is_refused_before_the_offset_is_measured(adapter, hq_folder, tmp_path) -> None:
    lora.attach(adapter)
    (tmp_path / "lq").symlink_to(hq_folder)

    def measure(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rewardsr.evaluation.evaluate.latent_offset", measure)
        with pytest.raises(UserError, match="psnr compare with an HQ image"):
            rewardsr.evaluate(adapter, tmp_path, ["psnr"], cast=True)
        with pytest.raises(UserError, match="name at least one reward"):
            rewardsr.evaluate(adapter, hq_folder, [], cast=True)
        with pytest.raises(AssertionError, match="measured"):
            rewardsr.evaluate(adapter, tmp_path, ["sharpness"], cast=True)


def test_evaluate_tells_it_and_records_it(commands: Commands, run, hq_folder, tmp_path) -> None:
    options = ("evaluate", hq_folder, "--run", run, "--metrics", "psnr,lq_consistency", "--limit", 2, "--draws", 2)
    plain = commands(*options, "-o", tmp_path / "plain")
    answer = commands(*options, "--cast", "-o", tmp_path / "found")
    assert answer.code == 0, answer.err
    own, content = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("plain", "found"))
    assert "casts" not in own and own["systems"] == content["systems"]
    found = Evaluation.from_dict(content)
    assert found.to_dict() == content and found.cast is not None
    assert len(found.cast.offset) == 4 and found.cast.measured_on == "the 2 images compared"
    assert str(found) in answer.out and str(found).startswith(plain.out.splitlines()[1])
    told = str(found).split("\n\n")[1]
    assert all(len(line) <= 80 for line in told.splitlines())
    assert [line.split()[0] for line in told.splitlines()[:3]] == ["reward", "psnr", "lq_consistency"]

    adapter, recipe = rewardsr.pipelines.open_run(str(run), device="cpu")
    images = rewardsr.data.protocol.open_images(recipe.data, hq_folder, adapter.scale).validation(2, recipe.seed)
    expected = latent_offset(adapter, images, "", seed=recipe.seed, draws_per_image=2)
    assert found.cast.offset == pytest.approx(tuple(expected.numbers.tolist()), abs=1e-6)

    lora_alone = ("--lora", run, "--base", recipe.base, "--option", "noise_t=250")
    answer = commands("evaluate", hq_folder, *lora_alone, "--limit", 1, "--cast", "--metrics", "psnr")
    assert answer.code == 0 and "[one image: none]" in answer.out and "no reward has a gain" in answer.out


def test_the_offset_of_other_images(commands: Commands, run, hq_folder, tmp_path) -> None:
    rewardsr.testing.write_images(tmp_path / "others", count=3, size=40)
    options = ("evaluate", hq_folder, "--run", run, "--metrics", "psnr", "--limit", 2)
    offsets = []
    for number, cast in enumerate((["--cast"], ["--cast-on", tmp_path / "others"], ["--cast-on", hq_folder])):
        answer = commands(*options, *cast, "-o", tmp_path / str(number))
        assert answer.code == 0, answer.err
        (cast,) = json.loads((tmp_path / str(number) / "evaluation.json").read_text())["casts"].values()
        offsets.append(cast)
    assert offsets[1]["measured_on"] == f"2 images of {tmp_path / 'others'}"
    assert offsets[0]["offset"] == offsets[2]["offset"] != offsets[1]["offset"]
    before = snapshot(tmp_path)
    answer = commands(*options, "--cast-on", tmp_path / "nowhere", "-o", tmp_path / "x")
    assert answer.code == 2 and "nowhere" in answer.err and answer.err.count("\n") == 1
    answer = commands("evaluate", hq_folder, "--base", "embedded", "--cast")
    assert answer.code == 2 and "no system carries one" in answer.err and snapshot(tmp_path) == before
