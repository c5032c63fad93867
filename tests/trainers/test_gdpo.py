"""GDPO on a tiny pipeline: the maths of its forms, and where it moves the policy."""

import math

import pytest
import torch
import torch.nn.functional as F
from _gdpo import count_rows, images, make, norm, step

from rewardsr import Batch, Draws, lora
from rewardsr.draws import Replay
from rewardsr.testing import tiny_pipeline
from rewardsr.trainers import gdpo, groups, preferences

LN2 = math.log(2)
FORMS = [{"preference": "paper"}, {"preference": "conditional"}, {"preference": "conditional", "shared_noise": True}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_pipeline(tmp_path_factory.mktemp("base")))


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Relative distance of two sets of gradients."""
    a, b = (torch.cat([value.flatten() for value in gradient.values()]) for gradient in (one, other))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fresh_lora_gives_exactly_ln_2_and_a_gradient(form, checkpointing, base, monkeypatch) -> None:
    """Policy and reference must run one numeric path: at beta 5000 a difference in the last bits would show."""
    seen = []

    def spy(policy, reference, advantages, beta):
        seen.append((policy.detach().flatten(), reference.flatten()))
        return original(policy, reference, advantages, beta)

    original = preferences.preference_logit
    for module in (preferences, gdpo):
        monkeypatch.setattr(module, "preference_logit", spy)
    for count, micro_batch in ((1, None), (2, None), (2, 2), (2, 4)):
        method = make(base, beta=5000, micro_batch=micro_batch, **form)
        if checkpointing:
            assert method.adapter.enable_gradient_checkpointing() == []
        group = method.prepare(images(count), Draws(0, 0, range(count)))
        gradient, losses = step(method, group)
        assert len(seen) >= len(losses) > 0
        assert all(torch.equal(policy, reference) for policy, reference in seen)
        wanted = {"loss": pytest.approx(LN2, abs=1e-7), "implicit_accuracy": 0, "distance": 0}
        assert all(loss.metrics == wanted for loss in losses)
        assert sum(loss.weight for loss in losses) == pytest.approx(1)
        # B is zero, so the gradient reaches B; without one at the start nothing would ever train.
        assert all(value.any() for name, value in gradient.items() if ".lora_B." in name)
        assert not any(value.any() for name, value in gradient.items() if ".lora_A." in name)
        seen.clear()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_micro_batches_give_the_gradient_of_the_whole(form, base) -> None:
    method = make(base, trained=True, group_size=4, beta=20, **form)
    group = method.prepare(images(2), Draws(0, 0, [0, 1]))
    whole, (loss,) = step(method, group)
    assert all(value.any() for value in whole.values())
    assert abs(float(loss.value.detach()) - LN2) > 1e-3  # the factor 1 - sigmoid(s) is not the one of the start
    for micro_batch in (1, 3, 4, 5, 8):
        method.micro_batch = micro_batch
        parts, losses = step(method, group)
        assert apart(parts, whole) <= 3e-5, micro_batch
        logged = sum(float(loss.metrics["loss"]) * loss.weight for loss in losses)
        assert logged == pytest.approx(float(loss.metrics["loss"]), abs=2e-5)
        again = method.prepare(images(2), Draws(0, 0, [0, 1]))
        assert torch.allclose(again.latents, group.latents, atol=1e-5)
        assert torch.allclose(again.advantages, group.advantages, atol=1e-3)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_image_does_not_depend_on_its_neighbours(form, base) -> None:
    """So two processes with one image each equal one with two."""
    method = make(base, trained=True, beta=500, **form)
    batch = images(2)
    both, _ = step(method, method.prepare(batch, Draws(0, 0, [0, 1])))
    total = dict.fromkeys(both, torch.zeros(()))
    for index in (0, 1):
        alone = Batch(lq=batch.lq[index, None], prompts=(batch.prompts[index],))
        group = method.prepare(alone, Draws(0, 0, [index]))
        gradient, _ = step(method, group, Draws(0, 0, [index], "update"))
        total = {name: total[name] + value / 2 for name, value in gradient.items()}
    assert apart(total, both) <= 3e-5


def test_shared_noise_is_the_same_maths_as_equal_noise_for_each(base) -> None:
    each = make(base, trained=True, preference="conditional", beta=20)
    shared = make(base, trained=True, preference="conditional", shared_noise=True, beta=20)
    group = each.prepare(images(2), Draws(0, 0, [0, 1]))
    noise = torch.randn(group.condition.latents.shape, generator=torch.Generator().manual_seed(1))
    calls = count_rows(shared.adapter)
    ours, (one,) = step(shared, group, Replay([noise]))
    assert calls == [2, 2]  # one pass of the reference and one of the policy, a row an image
    theirs, (other,) = step(each, group, Replay([noise.repeat_interleave(3, 0)]))
    assert float(one.value.detach()) == pytest.approx(float(other.value.detach()), rel=1e-5)
    assert apart(ours, theirs) <= 1e-4


def test_the_noise_of_the_sampling_would_teach_nothing(base) -> None:
    """Why the conditional form draws anew: at the noise of the sampling the reference is right already."""
    method = make(base, preference="conditional")
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    posterior = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    group = method.prepare(images(), Replay([posterior, noise]))
    stale, _ = step(method, group, Replay([noise]))
    fresh, _ = step(method, group)
    assert norm(stale) < 1e-3 * norm(fresh)


def test_the_policy_moves_towards_the_better_outputs(base) -> None:
    """The sign is right: on other noise, too, the best output becomes likelier than the worst, and not if flipped."""
    gaps = []
    for sign in (1, -1):
        method = make(base, preference="conditional", group_size=4, beta=100)
        adapter = method.adapter
        group = method.prepare(images(), Draws(0, 0, [0]))
        group = groups.Group(group.condition, group.latents, sign * group.advantages, group.metrics)
        optimiser = torch.optim.AdamW(lora.parameters(adapter).values(), lr=1e-3)
        for at in range(12):
            step(method, group, Draws(0, at, [0], "update"))
            optimiser.step()
        condition = group.condition.repeat(4)
        z_t = adapter.start(condition, Draws(1, 0, [0]))
        target = adapter.schedule.target_from(z_t, group.latents, 100)
        with torch.no_grad():
            policy = (adapter.predict(z_t, 100, condition) - target).square().mean((1, 2, 3))
            with lora.reference(adapter):
                reference = (adapter.predict(z_t, 100, condition) - target).square().mean((1, 2, 3))
        change, advantages = policy - reference, sign * group.advantages[0]
        gaps.append(float(change[advantages.argmax()] - change[advantages.argmin()]))
    assert gaps[0] < 0 < gaps[1]


def test_a_group_of_two(base) -> None:
    method = make(base, group_size=2)
    group = method.prepare(images(), Draws(0, 0, [0]))
    assert sorted(group.advantages[0].tolist()) == pytest.approx([-(0.5**0.5), 0.5**0.5])


def test_the_anchor_weighs_the_distance_from_the_reference(base) -> None:
    """In the gradient and in the value; a fresh LoRA has no distance, and nothing to be held."""
    free, held = make(base, trained=True), make(base, trained=True, anchor=7.0)
    group = free.prepare(images(2), Draws(0, 0, [0, 1]))
    (without, _), (with_it, losses) = step(free, group), step(held, group)
    task = free.groups.task(group, Draws(0, 0, [0, 1], "update"))
    rows = slice(0, len(task.condition))
    distance = F.mse_loss(free.groups.predictions(task, rows), free.groups.reference_predictions(task, rows))
    assert losses[0].metrics["distance"] == pytest.approx(float(distance.detach()), rel=1e-5)
    of_distance = torch.autograd.grad(7.0 * distance, list(lora.parameters(free.adapter).values()))
    added = {key: with_it[key] - without[key] for key in without}
    assert apart(added, dict(zip(without, of_distance, strict=True))) <= 1e-3
