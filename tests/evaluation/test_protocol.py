"""Paired comparison: same noise, honest intervals, one image at a time."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from rewardsr import load_adapter, lora, progress
from rewardsr.batch import Batch
from rewardsr.draws import Draws
from rewardsr.errors import TrainingError, UserError
from rewardsr.evaluation.comparison import Comparison, interval
from rewardsr.evaluation.offset import Offset
from rewardsr.evaluation.protocol import HeldOut
from rewardsr.evaluation.report import Evaluation
from rewardsr.evaluation.upscale import upscale_tensor
from rewardsr.rewards.fidelity import PSNR


class Brightness:
    """Mean value; needs no HQ."""

    name = "brightness"
    differentiable = True
    needs_hq = False
    licence = "Apache-2.0"
    kind = "detail"

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        return sr.mean((1, 2, 3))


class Broken(Brightness):
    """Gives whatever it is made with."""

    def __init__(self, scores: torch.Tensor) -> None:
        self._scores = scores

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._scores


def compare(adapter, images, rewards, **options) -> Evaluation:
    return HeldOut(adapter, lambda first, every: islice(images, first, None, every), rewards, **options).score()


def batches(count: int, hq: bool = True) -> list[Batch]:
    result = []
    for number in range(count):
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(number))
        lq = torch.nn.functional.avg_pool2d(image, 4)
        result.append(Batch(lq, image if hq else None, paths=(f"folder/{number}.png",)))
    return result


@pytest.fixture(scope="module")
def adapter(tiny):
    """A noisy one-step pipeline whose LoRA does something."""
    pipeline = load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=4)
    lora.attach(pipeline, rank=2)
    for name, parameter in lora.parameters(pipeline).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return pipeline


# ---- interval ----


@pytest.mark.parametrize(
    ("values", "mean", "half"),
    [
        ([0, 1], 0.5, 12.7062 * 0.5),  # Student's t of one degree of freedom, standard error 1/2
        ([1, 0] * 5, 0.5, 2.26216 / 6),  # nine; squares of 10 times 1/4, over 9 and over 10
        ([0.25] * 7, 0.25, 0),
    ],
)
def test_the_interval_by_hand(values, mean, half) -> None:
    assert interval(values) == pytest.approx((mean - half, mean + half), abs=1e-5)


@pytest.mark.parametrize("count", [2, 4, 12, 100])
def test_the_interval_covers_as_often_as_it_says(count) -> None:
    """Resampling four images by percentiles covers 79 times of 100."""
    samples = np.random.default_rng(count).normal(0.3, 1, (4000, count))
    held = [low <= 0.3 <= high for low, high in map(interval, samples)]
    assert 0.94 < np.mean(held) < 0.96


def test_the_interval_of_one_image_says_nothing() -> None:
    assert all(math.isnan(end) for end in interval([0.5]))


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_the_interval_refuses(values) -> None:
    with pytest.raises(ValueError, match="finite number"):
        interval(values)


# ---- comparison ----


def test_comparison_by_hand() -> None:
    comparison = Comparison((1.0, 2.0, 3.0, 4.0), (1.5, 2.0, 5.0, 3.5), 0, 1)
    assert comparison.differences == (0.5, 0, 2, -0.5)
    assert (comparison.base_mean, comparison.tuned_mean, comparison.difference) == (2.5, 3.0, 0.5)
    assert comparison.improved == 0.5  # equal is not better


def test_worst_images() -> None:
    scores = {"base": {"x": (0.0, 0.0, 0.0)}, "tuned": {"x": (1.0, -1.0, 0.5)}}
    evaluation = Evaluation(("a", "b", "c"), scores, 0, 1, "none")
    assert evaluation.worst("x", 2) == [("b", -1.0), ("c", 0.5)]


# ---- evaluate ----


def test_scores_are_of_the_same_noise(adapter) -> None:
    images = batches(3)
    result = compare(adapter, images, {"psnr": PSNR(), "light": Brightness()}, seed=5, draws_per_image=2)
    assert result.images == ("0.png", "1.png", "2.png") and list(result.rewards) == ["psnr", "light"]
    for index, batch in enumerate(images):
        before, after = [], []
        for number in range(2):
            with lora.reference(adapter):
                sr = upscale_tensor(adapter, batch, generator=Draws(5, number, [index], "evaluate"))
            before.append(float(PSNR()(sr, batch)))
            sr = upscale_tensor(adapter, batch, generator=Draws(5, number, [index], "evaluate"))
            after.append(float(PSNR()(sr, batch)))
        assert result.rewards["psnr"].base[index] == pytest.approx(sum(before) / 2, abs=1e-5)
        assert result.rewards["psnr"].tuned[index] == pytest.approx(sum(after) / 2, abs=1e-5)
    assert result.rewards["psnr"].difference != 0
    assert (
        compare(adapter, images, {"psnr": PSNR()}, seed=5, draws_per_image=2).rewards["psnr"] == result.rewards["psnr"]
    )


def test_a_lora_that_does_nothing_makes_no_difference(adapter) -> None:
    lora.set_scale(adapter, 0)
    try:
        comparison = compare(adapter, batches(2), {"psnr": PSNR()}).rewards["psnr"]
    finally:
        lora.set_scale(adapter, 1)
    assert comparison.differences == (0, 0) and (comparison.low, comparison.high) == (0, 0)
    assert comparison.improved == 0


def test_another_base_to_compare_with(adapter) -> None:
    assert compare(adapter, batches(2), {"psnr": PSNR()}, base=nullcontext).rewards["psnr"].differences == (0, 0)


def test_without_noise_one_draw_is_enough(tiny) -> None:
    pipeline = load_adapter("osediff", tiny, scale=4)
    assert compare(pipeline, batches(1), {"psnr": PSNR()}, draws_per_image=5).draws_per_image == 1


def test_images_come_one_at_a_time(adapter) -> None:
    """Nothing is asked for before the last image is done with."""
    done: list[torch.Tensor] = []

    class Light(Brightness):
        def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
            assert sr.shape == (1, 3, 16, 16) and not sr.requires_grad
            done.append(sr)
            return super().__call__(sr, batch)

    def stream() -> Iterator[Batch]:
        for number, batch in enumerate(batches(3)):
            assert len(done) == 2 * number
            yield batch

    compare(adapter, stream(), {"light": Light()}, color_fix="adain")
    assert len(done) == 6
    assert not any(torch.equal(base, tuned) for base, tuned in zip(done[::2], done[1::2], strict=True))


class Images:
    """What `HeldOut` asks for, of a list; notes what was asked for."""

    def __init__(self, count: int) -> None:
        self.batches, self.asked = batches(count), list[tuple[int, int]]()

    def __call__(self, first: int, every: int) -> list[Batch]:
        self.asked.append((first, every))
        return self.batches[first::every]


class Drawing(Brightness):
    """Draws from torch's global generator, as MANIQA does for its crops; notes how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.calls += 1
        return sr.mean((1, 2, 3)) + torch.rand(1)


def test_scored_again_the_base_is_remembered(adapter, tmp_path) -> None:
    images, metric = Images(3), Drawing()
    held_out = HeldOut(adapter, images, {"drawing": metric}, seed=5, run=tmp_path, pictures=2, picture_side=8)
    first = held_out.score(0)
    state = torch.get_rng_state()
    again = held_out.score(12)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again == HeldOut(adapter, images, {"drawing": Drawing()}, seed=5).score()
    assert metric.calls == 3 * 2 + 3
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == [
        "pictures",
        *(f"step-{step:08d}.{kind}" for step in (0, 12) for kind in ("json", "png")),
    ]
    single = sorted(path.name for path in (tmp_path / "validation" / "pictures").iterdir())
    assert single == [
        f"000{place}-{label}.webp"
        for place in (0, 1)
        for label in ("HQ", "LQ", "base", "step-00000000", "step-00000012")
    ]
    for place, row in enumerate(held_out.rows):
        for label, (_, image) in zip(("LQ", "base", "step-00000012", "HQ"), row, strict=True):
            kept = np.asarray(Image.open(tmp_path / "validation" / "pictures" / f"000{place}-{label}.webp"))
            assert np.array_equal(kept.transpose(2, 0, 1), image.numpy()), "without loss"
    written = json.loads((tmp_path / "validation" / "step-00000012.json").read_text())
    assert Evaluation.from_dict(written) == again
    assert [[caption for caption, _ in row] for row in held_out.rows] == [
        [f"{name} LQ", "base", "tuned", "HQ"] for name in "01"
    ]
    assert {tuple(image.shape) for row in held_out.rows for _, image in row} == {(3, 8, 8)}
    lora.set_scale(adapter, 0)  # the base in training: what is compared with it moves on
    try:
        moved = held_out.score(13).rewards["drawing"]
    finally:
        lora.set_scale(adapter, 1)
    assert moved.base == moved.tuned == first.rewards["drawing"].base != first.rewards["drawing"].tuned


def test_what_this_process_scores_shows_in_a_bar(adapter, capfd, monkeypatch) -> None:
    monkeypatch.setattr(progress, "SELDOM", 0)

    def told(held_out: HeldOut, *given) -> list[str]:
        held_out._score_share(*given or (None,))
        return [line.split("  ")[0] for line in capfd.readouterr().err.splitlines()]

    rewards = {"psnr": PSNR()}
    assert told(HeldOut(adapter, Images(3), rewards)) == []
    assert told(HeldOut(adapter, Images(3), rewards, count=3)) == [f"validation {n}/3" for n in (1, 2, 3)]
    second = HeldOut(
        adapter, Images(3), rewards, count=3, accelerator=SimpleNamespace(process_index=1, num_processes=2)
    )
    assert told(second) == ["validation 1/1"]
    offset = Offset(torch.zeros(4), "nothing")
    assert told(HeldOut(adapter, Images(2), rewards, count=2), offset) == ["cast test 1/2", "cast test 2/2"]

    class Fails(Brightness):
        def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
            raise ValueError

    with pytest.raises(ValueError):
        HeldOut(adapter, Images(1), {"x": Fails()}, count=1).score()
    assert not progress._display._work


def test_memory_that_runs_out_comes_with_advice(adapter) -> None:
    class Large(Brightness):
        def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        compare(adapter, batches(1), {"large": Large()})
    with pytest.raises(TrainingError, match=r"^lower data\.validation_side$"):
        HeldOut(adapter, Images(1), {"x": Large()}, memory_advice="lower data.validation_side").score()


def test_two_processes_share_the_images_and_find_what_one_finds(adapter, tiny, tmp_path) -> None:
    """The figures are equal bit for bit; a failure in one process ends both in the same line."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("sharing.py")
    lora.save(adapter, tmp_path / "lora")
    done = subprocess.run(
        [*launch, script, tiny, tmp_path], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    alone = HeldOut(adapter, Images(3), {"psnr": PSNR(), "drawing": Drawing()}, run=tmp_path / "one")
    expected = alone.score(4).to_json()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [entry["scores"] for entry in said] == [expected, expected]
    assert [entry["calls"] for entry in said] == [2 * 2 + 2, 2 + 1]  # images 0 and 2; image 1; the base only once
    for name in ("step-00000004.json", "step-00000004.png"):
        one, two = (tmp_path / run / "validation" / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert [entry["errors"] for entry in said] == [
        ["TrainingError: reward 'bad' gave nan for 1.png (base)", message, "UserError: no such disk"]
        for message in ("TrainingError: ZeroDivisionError: on image 1", "ZeroDivisionError: on image 1")
    ]


def test_json_round_trip(adapter) -> None:
    for count in (1, 3):
        result = compare(adapter, batches(count), {"psnr": PSNR()}, color_fix="wavelet")
        content = json.loads(result.to_json())
        assert Evaluation.from_dict(content).to_dict() == content
        psnr = content["systems"]["tuned"]["psnr"]
        assert content["color_fix"] == "wavelet" and psnr["improved"] in (0, 1 / 3, 2 / 3, 1)
        assert (psnr["interval"] == [None, None]) == (count == 1)


def test_refused(adapter) -> None:
    with pytest.raises(UserError, match="at least one reward"):
        compare(adapter, batches(1), {})
    with pytest.raises(UserError, match="no images"):
        compare(adapter, [], {"psnr": PSNR()})
    with pytest.raises(UserError, match=r"psnr compare.* HQ image, and 0\.png has none"):
        compare(adapter, batches(1, hq=False), {"psnr": PSNR(), "light": Brightness()})
    with pytest.raises(ValueError, match="one image, got 2"):
        compare(adapter, [Batch(torch.rand(2, 3, 4, 4))], {"light": Brightness()})
    with pytest.raises(ValueError, match="at least one draw"):
        compare(adapter, batches(1), {"psnr": PSNR()}, draws_per_image=0)
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(\)"):
        compare(adapter, batches(1), {"bad": Broken(torch.tensor(1.0))})
    with pytest.raises(TrainingError, match=r"'bad' gave nan for 0\.png \(base\)"):
        compare(adapter, batches(1), {"bad": Broken(torch.tensor([math.nan]))})
