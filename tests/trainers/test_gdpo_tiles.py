"""Rewards that judge tiles: each tile is a group of its own, and weighs the error of its own place."""

import pytest
import torch
from _gdpo import Score, images, make, step

from rewardsr import Draws
from rewardsr.errors import UserError
from rewardsr.testing import tiny_pipeline
from rewardsr.trainers import groups, preferences

FORMS = ({}, {"preference": "conditional"}, {"preference": "conditional", "shared_noise": True})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_pipeline(tmp_path_factory.mktemp("base")))


def gradient(method, group) -> torch.Tensor:
    return torch.cat([value.flatten() for value in step(method, group)[0].values()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_tiles_of_an_image_are_adjacent_and_go_by_rows() -> None:
    image = torch.arange(2 * 4 * 6).reshape(2, 1, 4, 6)
    cut = groups._tiles(image, 2)
    assert cut.shape == (12, 1, 2, 2)
    assert cut[1].flatten().tolist() == [2, 3, 8, 9] and cut[3].flatten().tolist() == [12, 13, 18, 19]
    assert cut[6].flatten().tolist() == [24, 25, 30, 31]


def test_every_tile_is_judged_and_ranked_by_itself(base) -> None:
    reward = Score()
    method = make(base, rewards=[reward], reward_tile=8)
    seen = []
    decode = method.adapter.decode
    method.adapter.decode = lambda z0, condition: seen.append(decode(z0, condition)) or seen[-1]
    batch = images(2)
    group = method.prepare(batch, Draws(0, 0, [0, 1]))
    sr = torch.cat(seen)
    assert group.advantages.shape == (2 * 4, 3)
    for image in range(2):
        for tile, (top, left) in enumerate(((0, 0), (0, 8), (8, 0), (8, 8))):
            outputs = sr[3 * image : 3 * image + 3, :, top : top + 8, left : left + 8].mean((1, 2, 3))
            wanted = preferences.group_advantages({"a": outputs[None]}, {"a": torch.ones(1)})[0]
            assert torch.allclose(group.advantages[4 * image + tile], wanted, atol=1e-4)
    judged = torch.cat([scored.hq for scored in reward.batches])
    assert torch.equal(judged[1], batch.hq[0, :, :8, 8:]) and torch.equal(judged[4], batch.hq[0, :, :8, :8])
    assert reward.batches[0].lq.shape[-2:] == (8, 8)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_tile_as_large_as_the_image_changes_nothing(form, base) -> None:
    whole, tiled = make(base, trained=True, **form), make(base, trained=True, reward_tile=16, **form)
    one, other = (method.prepare(images(2), Draws(0, 0, [0, 1])) for method in (whole, tiled))
    assert torch.equal(one.advantages, other.advantages)
    assert apart(gradient(tiled, other), gradient(whole, one)) <= 1e-4


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_tile_has_the_loss_of_a_group(form, base) -> None:
    whole, tiled = make(base, trained=True, **form), make(base, trained=True, reward_tile=8, **form)
    group = tiled.prepare(images(2), Draws(0, 0, [0, 1]))
    draws = [Draws(0, 0, [0, 1], "update") for _ in range(3)]
    task = whole.groups.task(group, draws[0])
    rows = slice(0, len(task.condition))
    one, four = whole.groups.errors(task, rows), tiled.groups.errors(task, rows)
    assert torch.allclose(four.reshape(6, 4).mean(1), one, rtol=1e-5)
    reference = tiled.groups.reference_errors(task, rows).reshape(2, 3, 4)
    losses = [
        preferences.gdpo_loss(
            preferences.preference_logit(
                four.reshape(2, 3, 4)[image, :, tile][None],
                reference[image, :, tile][None],
                group.advantages[4 * image + tile][None],
                tiled.options.beta,
            )
        )[0]
        for image in range(2)
        for tile in range(4)
    ]
    wanted = torch.stack(losses).mean()
    found = sum(float(loss.value.detach()) for loss in tiled.losses(group, draws[1]))
    assert abs(found - float(wanted.detach())) <= 1e-5 * float(wanted.detach())


@pytest.mark.parametrize("form", [*FORMS, {"anchor": 3e3}, {"anchor": 3e3, "reward_tile": None}], ids=str)
def test_micro_batches_give_the_gradient_of_the_whole(form, base) -> None:
    method = make(base, trained=True, **({"reward_tile": 8} | form))
    group = method.prepare(images(2), Draws(0, 0, [0, 1]))
    whole = gradient(method, group)
    for rows in (1, 2, 3, 4):
        method.micro_batch = rows
        assert apart(gradient(method, group), whole) <= 3e-5, rows


def test_what_is_better_in_one_tile_is_learnt_there(base) -> None:
    """A reward that tells outputs apart in one tile alone leaves the errors of all others without weight."""
    first = Score(lambda sr: sr.mean((1, 2, 3)) * (torch.arange(len(sr)) % 4 == 0))
    group = make(base, rewards=[first], reward_tile=8).prepare(images(1), Draws(0, 0, [0]))
    assert bool(group.advantages[0].any()) and not bool(group.advantages[1:].any())


def test_shuffled_tiles_keep_their_advantages(base) -> None:
    plain, dealt = (
        make(base, reward_tile=8, shuffle_advantages=shuffled).prepare(images(2), Draws(0, 0, [0, 1])).advantages
        for shuffled in (False, True)
    )
    assert not torch.equal(plain, dealt)
    assert torch.equal(*(found.sort(1).values for found in (plain, dealt)))


def test_tiles_that_do_not_fit_are_refused(base) -> None:
    with pytest.raises(UserError, match="reward_tile is 10, expected a multiple of 4 pixels here"):
        make(base, reward_tile=10)
    method = make(base, reward_tile=12)
    method.check_size((24, 36))
    with pytest.raises(UserError, match=r"tiles of 12 pixels \(reward_tile\) do not fill images of 32x24"):
        method.check_size((24, 32))
