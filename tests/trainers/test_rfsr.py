"""RFSR: windows, rollout, terms, average of the weights, crops and chunks, and what it refuses."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.errors import TrainingError
from rewardsr.rewards import build
from rewardsr.trainers.ema import EMA, decay_at
from rewardsr.trainers.rfsr import RFSR, RFSROptions, windows


def images(rows: int, side: int = 32) -> Batch:
    random = torch.Generator().manual_seed(0)
    hq = torch.nn.functional.interpolate(torch.rand(rows, 3, 8, 8, generator=random), (side, side), mode="bilinear")
    hq = (hq + 0.05 * torch.randn(hq.shape, generator=random)).clamp(0, 1)
    return Batch(torch.nn.functional.avg_pool2d(hq, 4), hq, prompts=("a photo",) * rows)


@pytest.fixture
def pipeline(tiny_base):
    """A pipeline of so many steps; the one-step adapter, told more times, is a small sampler of several."""

    def make(steps: int = 5):
        adapter = load_adapter("osediff", tiny_base, noise_t=250)
        adapter.steps = tuple(range(200 * (steps - 1) + 100, 0, -200)) if steps > 1 else (100,)
        lora.attach(adapter)
        return adapter

    return make


@pytest.fixture
def method(pipeline, data):
    def make(steps: int = 5, rewards=("detail",), weights=None, **options) -> RFSR:
        options = {"vgg": str(data / "vgg19_narrow.safetensors"), "text_dropout": 0.0} | options
        weights = dict.fromkeys(rewards, 1.0) if weights is None else weights
        return RFSR(pipeline(steps), {name: build(name) for name in rewards}, weights, RFSROptions(**options))

    return make


def gradients(adapter) -> dict[str, torch.Tensor]:
    found = {name: value.grad for name, value in lora.parameters(adapter).items()}
    for value in lora.parameters(adapter).values():
        value.grad = None
    return found


def shake(adapter, by: float = 0.02) -> None:
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in lora.parameters(adapter).values():
            value.add_(by * torch.randn(value.shape, generator=random))


# ---- windows ----


@pytest.mark.parametrize(
    ("steps", "structure", "late"),
    [(50, (0, 19), (40, 49)), (75, (0, 29), (60, 74)), (4, (0, 0), (3, 3)), (2, (0, 0), (1, 1)), (1, (0, 0), (0, 0))],
)
def test_default_windows(steps, structure, late) -> None:
    assert windows(RFSROptions(), steps, True) == {"structure": structure, "reward": late, "kl": late}


def test_windows_that_are_switched_off() -> None:
    assert windows(RFSROptions(kl_weight=0), 50, False) == {"structure": (0, 19)}
    assert windows(RFSROptions(structure_weight=0, kl_weight=0), 50, True) == {"reward": (40, 49)}
    assert windows(RFSROptions(reward_window=(30, 45)), 50, True)["kl"] == (30, 45)
    assert windows(RFSROptions(kl_window=(0, 49)), 50, True)["kl"] == (0, 49)


@pytest.mark.parametrize("name", ["structure", "reward", "kl"])
@pytest.mark.parametrize("window", [(40, 50), (-1, 3), (5, 4)])
def test_windows_outside_the_schedule(name, window) -> None:
    with pytest.raises(UserError, match=f"{name}_window is .* the pipeline's steps are 0 to 49"):
        windows(RFSROptions(**{f"{name}_window": window}), 50, True)


def test_nothing_to_train_on() -> None:
    with pytest.raises(UserError, match="nothing to train on"):
        windows(RFSROptions(structure_weight=0), 50, False)


def test_steps_are_drawn_uniformly_from_the_enabled_windows(method) -> None:
    made = method(50, rollout="none")
    draws = [int(made.prepare(images(1, 16), Draws(0, step, [0])).step) for step in range(600)]
    seen = Counter(draws)
    assert set(seen) <= {*range(20), *range(40, 50)} and len(seen) == 30
    early = sum(seen[step] for step in range(20)) / 600
    assert abs(early - 2 / 3) < 4 * (2 / 9 / 600) ** 0.5  # four standard errors
    assert max(seen.values()) < 20 + 4 * 20**0.5


# ---- rollout ----


@torch.no_grad()
def test_rollout_goes_down_to_the_drawn_step_under_the_policy(method) -> None:
    made = method(5)
    adapter = made.adapter
    shake(adapter)
    group = made.prepare(images(4), Draws(0, 1, range(4)))
    assert len(set(group.step.tolist())) > 1, "choose another seed: the rows should stop at different steps"
    draws = Draws(0, 1, range(4))
    draws.take((4, 1), len(made._enabled)), draws.take((4, 1), 2**24)
    condition = adapter.encode(images(4), generator=draws)
    z = adapter.start(condition, draws)
    for taken, (time, following) in enumerate(zip(adapter.steps, adapter.steps[1:], strict=False)):
        arrived = group.step == taken
        assert torch.allclose(group.z_t[arrived], z[arrived], atol=1e-5)
        eps = adapter.predict(z, time, condition)
        z, _ = adapter.schedule.transition(z, eps, time, following)
    with lora.reference(adapter):
        untuned = made.prepare(images(4), Draws(0, 1, range(4)))
    late = group.step > 0
    assert not torch.allclose(untuned.z_t[late], group.z_t[late])


@torch.no_grad()
def test_without_rollout_the_start_latents_go_in(method) -> None:
    made = method(5, rollout="none")
    group = made.prepare(images(2), Draws(0, 1, range(2)))
    rolled = method(5).prepare(images(2), Draws(0, 1, range(2)))
    assert bool((group.step > 0).any())
    later = group.step > 0
    assert torch.equal(group.step, rolled.step)
    assert not torch.allclose(group.z_t[later], rolled.z_t[later])


def test_rows_do_not_depend_on_each_other(method) -> None:
    made = method(5)
    both = made.prepare(images(3), Draws(0, 1, [0, 1, 2]))
    alone = made.prepare(images(3).rows(torch.tensor([1])), Draws(0, 1, [1]))
    assert alone.step.tolist() == both.step[1:2].tolist()
    assert torch.allclose(alone.z_t, both.z_t[1:2], atol=1e-5)


def test_text_dropout(method) -> None:
    texts = Counter()
    for step in range(50):
        texts.update(method_of(method).prepare(images(4, 16), Draws(0, step, range(4))).batch.prompts)
    assert set(texts) == {"", "a photo"}
    assert abs(texts[""] / 200 - 0.5) < 4 * 0.5 / 200**0.5
    assert method(1, text_dropout=1.0).prepare(images(2), Draws(0, 0, [0, 1])).batch.prompts == ("", "")
    own = replace(images(2), prompts=None)
    assert method(1).prepare(own, Draws(0, 0, [0, 1])).batch.prompts == (None, None)


_MADE: list[RFSR] = []


def method_of(make) -> RFSR:
    if not _MADE:
        _MADE.append(make(1, rollout="none", text_dropout=0.5, kl_weight=0))
    return _MADE[0]


# ---- terms ----


def terms(method: RFSR, batch: Batch, step: int = 0, update: str = "update") -> tuple[dict[str, float], dict]:
    group = method.prepare(batch, Draws(0, step, range(len(batch))))
    total: dict[str, float] = {}
    for loss in method.losses(group, Draws(0, step, range(len(batch)), update)):
        loss.value.backward()
        for name, value in loss.metrics.items():
            total[name] = total.get(name, 0.0) + value * loss.weight
    return total, gradients(method.adapter)


def test_a_one_step_pipeline_has_every_term(method) -> None:
    made = method(1, structure_weight=0.5, kl_weight=2.0, margin=0.0)
    shake(made.adapter)
    found, grads = terms(made, images(2))
    assert set(found) == {"loss", "loss/structure", "loss/detail", "loss/kl"}
    assert all(value > 0 for value in found.values())
    assert abs(found["loss"] - sum(found[f"loss/{name}"] for name in ("structure", "detail", "kl"))) < 1e-6
    group = made.prepare(images(2), Draws(0, 0, range(2)))
    with torch.no_grad():
        sr = made.adapter.decode(made.adapter.sample_latents(group.condition, Draws(0, 0, [0, 1])), group.condition)
        low, high = (
            torch.nn.functional.avg_pool2d(x, 8) * 8 for x in (made._image(group, torch.arange(2)), group.batch.hq)
        )
        assert abs(found["loss/structure"] - 0.5 * float((low - high).abs().mean())) < 1e-6
        assert (
            abs(found["loss/detail"] + float(build("detail")(made._image(group, torch.arange(2)), group.batch).mean()))
            < 1e-6
        )
    assert sr.shape == group.batch.hq.shape
    assert all(bool(value.isfinite().all()) for value in grads.values())
    assert any(bool(value.any()) for value in grads.values())


def test_terms_act_in_their_windows_only(method) -> None:
    made = method(5, structure_weight=1.0, kl_weight=1.0)
    shake(made.adapter)
    seen = set()
    for step in range(12):
        group = made.prepare(images(1), Draws(0, step, [0]))
        (loss,) = made.losses(group, Draws(0, step, [0], "update"))
        index = int(group.step)
        seen.add(index)
        assert (loss.metrics["loss/structure"] > 0) == (index in (0, 1))
        assert (loss.metrics["loss/detail"] > 0) == (index == 4)
        assert (loss.metrics["loss/kl"] > 0) == (index == 4)
        assert loss.value.requires_grad
    assert seen == {0, 1, 4}


def test_a_fresh_lora_has_no_style_distance_and_a_changed_one_has(method) -> None:
    made = method(1, kl_weight=1.0)
    assert terms(made, images(3))[0]["loss/kl"] == 0
    shake(made.adapter)
    assert terms(made, images(3))[0]["loss/kl"] > 0


def test_the_hinge_stops_at_the_margin(method) -> None:
    made = method(1, structure_weight=0, kl_weight=0, margin=-100.0)
    found, grads = terms(made, images(2))
    assert found["loss"] == 0
    assert not any(bool(value.any()) for value in grads.values())


@pytest.mark.parametrize("steps", [1, 5])
def test_chunks_give_the_same_gradients(method, steps) -> None:
    whole, parts = method(steps, kl_weight=1.0), method(steps, kl_weight=1.0, micro_batch=1)
    for made in (whole, parts):
        shake(made.adapter)
    (one, ours), (other, theirs) = terms(whole, images(4), 3), terms(parts, images(4), 3)
    assert one.keys() == other.keys()
    assert all(abs(one[name] - other[name]) < 1e-5 for name in one)
    whole, chunks = (torch.cat([value.flatten() for value in found.values()]) for found in (ours, theirs))
    # In another batch shape a value at a kink (a pixel at the end of [0, 1]) may fall on its other side.
    assert float((whole - chunks).norm() / whole.norm()) < 1e-3


@pytest.mark.parametrize("padding", [4, 16])
def test_reward_crop_judges_a_window(method, padding) -> None:
    """Which a family that pads to more than a latent's four pixels does not change."""
    made = method(1, reward_crop=16)
    made.adapter.size_multiple = padding
    group = made.prepare(images(6), Draws(0, 0, range(6)))
    assert len({tuple(corner) for corner in group.corner.tolist()}) > 1
    judged = made._judged(group, torch.arange(6))
    assert judged.hq.shape == (6, 3, 16, 16) and judged.lq.shape == (6, 3, 4, 4)
    top, left = (group.corner[0] * 4).tolist()
    assert torch.equal(judged.hq[0], group.batch.hq[0, :, top : top + 16, left : left + 16])
    assert torch.equal(judged.lq[0], group.batch.lq[0, :, top // 4 : top // 4 + 4, left // 4 : left // 4 + 4])
    assert made._image(group, torch.arange(6)).shape == (6, 3, 16, 16)
    found, grads = terms(made, images(6))
    assert found["loss"] > 0 and any(bool(value.any()) for value in grads.values())


@torch.no_grad()
def test_the_window_of_the_output_is_that_of_the_images(method, monkeypatch) -> None:
    """With a decoder that only enlarges: a real one makes something else of a window at its border."""
    made = method(1, reward_crop=16)
    group = made.prepare(images(6), Draws(0, 0, range(6)))
    monkeypatch.setattr(made.adapter, "_to_image", lambda z: z[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3))
    windows = made._image(group, torch.arange(6))
    made.options = made.options.model_copy(update={"reward_crop": None})
    whole = made._image(group, torch.arange(6))
    for index, (top, left) in enumerate((group.corner * 4).tolist()):
        assert torch.equal(windows[index], whole[index, :, top : top + 16, left : left + 16])


# ---- the average ----


def test_warm_up_of_the_decay() -> None:
    assert [round(decay_at(n, 0.999), 4) for n in (0, 1, 90)] == [0.1, 0.1818, 0.91]
    assert decay_at(10**6, 0.999) == 0.999


def test_the_average_is_what_is_shipped(method) -> None:
    made = method(1, ema=0.9)
    start = {name: value.detach().clone() for name, value in lora.parameters(made.adapter).items()}
    shake(made.adapter)
    trained = {name: value.detach().clone() for name, value in lora.parameters(made.adapter).items()}
    made.after_update()
    with made.shipped():
        for name, value in lora.parameters(made.adapter).items():
            assert torch.allclose(value, 0.1 * start[name] + 0.9 * trained[name], atol=1e-6)
    assert all(torch.equal(value, trained[name]) for name, value in lora.parameters(made.adapter).items())


def test_all_tensors_at_once_are_averaged_as_one_by_one(pipeline) -> None:
    """Bit for bit, in the warm-up of the decay as after it."""
    adapter = pipeline(1)
    parameters = lora.parameters(adapter)
    ema, expected = EMA(parameters, 0.5), {name: value.detach().clone() for name, value in parameters.items()}
    for update in range(20):
        shake(adapter)
        ema.update()
        for name, value in expected.items():
            value.lerp_(parameters[name].detach(), 1 - decay_at(update, 0.5))
    with ema.applied():
        assert all(torch.equal(value, expected[name]) for name, value in parameters.items())
    assert not all(torch.equal(value, expected[name]) for name, value in parameters.items())


def test_the_average_survives_a_save(pipeline) -> None:
    adapter = pipeline(1)
    one = EMA(lora.parameters(adapter), 0.9)
    shake(adapter)
    one.update()
    state = one.state_dict()
    shake(adapter, 1.0)
    two = EMA(lora.parameters(adapter), 0.9)
    two.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in two.state_dict().items())
    with pytest.raises(KeyError):
        two.load_state_dict({"updates": torch.tensor(1)})


# ---- bad input ----


def test_options_that_cannot_work(method, data, tmp_path) -> None:
    with pytest.raises(UserError, match="reward_crop is 18: expected a multiple of 4"):
        method(1, reward_crop=18)
    with pytest.raises(UserError, match="reward_crop is 48, but the images have 32x32"):
        method(1, reward_crop=48).prepare(images(1), Draws(0, 0, [0]))
    with pytest.raises(UserError, match="the style distance needs 16 pixels a side, not 8"):
        method(1, structure_level=1).prepare(images(1, 8), Draws(0, 0, [0]))
    with pytest.raises(UserError, match="16 pixels are too few for structure_level 5"):
        method(1, structure_level=5).prepare(images(1, 16), Draws(0, 0, [0]))
    with pytest.raises(TrainingError, match="HQ"):
        method(1).prepare(replace(images(1), hq=None), Draws(0, 0, [0]))
    with pytest.raises(UserError, match="no weights file"):
        method(1, vgg=str(tmp_path / "nowhere.pth"))
    (tmp_path / "vgg.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"vgg\.pth"):
        method(1, vgg=str(tmp_path / "vgg.pth"))
    with pytest.raises(UserError, match="expected VGG19's"):
        method(1, vgg=str(data / "rfsr_step.safetensors"))


def test_vgg_offline_is_refused_with_a_way_out(method, monkeypatch, tmp_path, contacted) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"trainer_options\.vgg=FILE.*kl_weight=0"):
        method(1, vgg=None)
    assert not contacted


def test_vgg_reads_torchvisions_own_file(data, tmp_path) -> None:
    from safetensors.torch import load_file

    from rewardsr.rewards.vgg import VGG19

    state = load_file(data / "vgg19_narrow.safetensors")
    torch.save(state | {"classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg19-dcbb9e9d.pth")
    picture = torch.rand(1, 3, 32, 32)
    one, other = (
        VGG19(str(path))(picture) for path in (data / "vgg19_narrow.safetensors", tmp_path / "vgg19-dcbb9e9d.pth")
    )
    assert all(torch.equal(one[layer], other[layer]) for layer in one)
