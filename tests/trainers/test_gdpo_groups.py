"""GDPO's groups on a tiny pipeline: how they are sampled and scored, what a step costs, and what is refused."""

import math

import pytest
import torch
from _gdpo import Score, count_rows, images, make, norm, step

from rewardsr import Batch, Draws, load_adapter, lora
from rewardsr.errors import TrainingError, UserError
from rewardsr.rewards.attribute import texture_share
from rewardsr.testing import tiny_pipeline
from rewardsr.trainers import groups, preferences
from rewardsr.trainers.gdpo import GDPO, GDPOOptions

LN2 = math.log(2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_pipeline(tmp_path_factory.mktemp("base")))


def test_prepare_is_a_function_of_its_inputs(base) -> None:
    method = make(base, trained=True)
    one, same, other = (method.prepare(images(), Draws(0, at, [0])) for at in (0, 0, 1))
    assert torch.equal(one.latents, same.latents) and torch.equal(one.advantages, same.advantages)
    assert one.metrics == same.metrics
    assert not torch.equal(one.latents, other.latents)
    assert not any(tensor.requires_grad for tensor in (one.latents, one.advantages, one.condition.latents))


def test_the_group_comes_from_the_reference(base) -> None:
    fresh, trained = (make(base, trained=trained).prepare(images(), Draws(0, 0, [0])) for trained in (False, True))
    assert torch.equal(fresh.latents, trained.latents)


def test_every_row_has_the_text_and_the_image_that_it_was_made_from(base) -> None:
    reward = Score()
    method = make(base, rewards=[reward])
    seen = []

    def spy(z_t, t, condition):
        seen.append(condition)
        return original(z_t, t, condition)

    original = method.adapter._predict
    method.adapter._predict = spy
    batch = images(2)
    step(method, method.prepare(batch, Draws(0, 0, [0, 1])))
    texts = method.adapter.encode(batch).text
    assert not torch.equal(texts[0], texts[1])
    assert len(seen) == 3
    for condition in seen:
        assert torch.equal(condition.text, texts[[0, 0, 0, 1, 1, 1]])
    assert sum((scored.prompts for scored in reward.batches), ()) == ("a cat",) * 3 + ("a much longer text",) * 3
    assert torch.equal(torch.cat([scored.hq for scored in reward.batches]), batch.hq[[0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("options", "pixels", "seen"),
    [
        ({}, 2**19, [3, 3]),
        ({}, 2 * 16 * 16, [2, 2, 2]),
        ({}, 10, [1] * 6),
        ({"micro_batch": 2}, 2**19, [2, 2, 2]),
        ({"micro_batch": 100}, 2**19, [3, 3]),
        ({"reward_batch": 5}, 10, [3, 3]),
        ({"reward_batch": 6, "micro_batch": 1}, 10, [6]),
    ],
    ids=str,
)
def test_a_reward_sees_so_many_images_at_once(options, pixels, seen, base, monkeypatch) -> None:
    monkeypatch.setattr(groups, "REWARD_PIXELS", pixels)
    reward, light = Score(), Score(name="light")
    light.light = True
    group = make(base, rewards=[reward, light], **options).prepare(images(2), Draws(0, 0, [0, 1]))
    assert [len(batch) for batch in reward.batches] == seen
    assert [len(batch) for batch in light.batches] == [6]
    whole = make(base, reward_batch=6).prepare(images(2), Draws(0, 0, [0, 1]))
    assert torch.allclose(group.advantages, whole.advantages, atol=1e-4)


def test_a_reward_that_draws_judges_all_members_alike(base) -> None:
    """Its scores are those of one call, and torch's generator goes on as after one."""
    drawn = []

    def noisy(sr: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand(1))
        return sr.mean((1, 2, 3)) * drawn[-1]

    after = []
    for reward_batch in (1, 2, 6):
        torch.manual_seed(4)
        make(base, rewards=[Score(noisy)], reward_batch=reward_batch).prepare(images(2), Draws(0, 0, [0, 1]))
        after.append(torch.rand(1))
    assert len(drawn) == 6 + 3 + 1
    assert len(set(map(float, drawn))) == len(set(map(float, after))) == 1


def recorded(adapter) -> list[tuple[str, int, bool]]:
    """(hook, rows, whether our LoRA is on) of every call of the networks from now on."""
    calls: list[tuple[str, int, bool]] = []

    def wrap(name: str):
        original = getattr(adapter, name)

        def call(first, *rest):
            calls.append((name.removeprefix("_"), len(first), bool(lora.active(adapter))))
            return original(first, *rest)

        return call

    for name in ("_encode", "_start", "_predict", "_to_latents", "_to_image"):
        setattr(adapter, name, wrap(name))
    return calls


def test_what_one_step_of_the_paper_form_costs(base) -> None:
    method = make(base, group_size=3)
    rows = count_rows(method.adapter)
    calls = recorded(method.adapter)
    step(method, method.prepare(images(), Draws(0, 0, [0])))
    assert calls == [
        ("encode", 1, False),
        ("to_latents", 1, False),  # of the LQ image, inside encode
        ("start", 3, False),
        ("predict", 3, False),
        ("to_image", 3, False),
        ("to_latents", 3, False),  # of the outputs
        ("predict", 3, False),  # reference
        ("predict", 3, True),  # policy
    ]
    assert rows == [3, 3, 3]


def test_what_one_step_of_the_conditional_form_costs(base) -> None:
    method = make(base, preference="conditional", shared_noise=True)
    calls = recorded(method.adapter)
    step(method, method.prepare(images(2), Draws(0, 0, [0, 1])))
    assert calls == [
        ("encode", 2, False),
        ("to_latents", 2, False),
        ("start", 6, False),
        ("predict", 6, False),
        ("to_image", 6, False),  # for the rewards; nothing is encoded again
        ("start", 2, True),
        ("predict", 2, False),
        ("predict", 2, True),
    ]


def test_each_text_is_encoded_once(base) -> None:
    method = make(base)
    texts = []
    encoder = method.adapter._text_encoder
    encoder.register_forward_pre_hook(
        lambda module, inputs, named: texts.extend([*inputs, *named.values()][:1]), with_kwargs=True
    )
    batch = images(2)
    for at in range(3):
        step(method, method.prepare(batch, Draws(0, at, [0, 1])))
    assert [len(ids) for ids in texts] == [2]
    method.prepare(Batch(lq=batch.lq, prompts=("a cat", "new")), Draws(0, 3, [0, 1]))
    assert [len(ids) for ids in texts] == [2, 1]


def test_ties_teach_nothing_and_are_counted(base) -> None:
    method = make(base, rewards=[Score(lambda sr: torch.ones(len(sr)))], trained=True)
    group = method.prepare(images(2), Draws(0, 0, [0, 1]))
    assert not group.advantages.any()
    assert group.metrics["group/tied"] == 1
    gradient, (loss,) = step(method, group)
    assert float(loss.value.detach()) == pytest.approx(LN2)
    assert all(value is not None and not value.any() for value in gradient.values())


def test_one_tied_group_does_not_hide_the_other(base) -> None:
    scores = torch.tensor([1.0, 1, 1, 0, 1, 2])
    method = make(base, rewards=[Score(lambda sr: scores)], reward_batch=6)
    group = method.prepare(images(2), Draws(0, 0, [0, 1]))
    assert group.metrics["group/tied"] == 0.5
    assert group.advantages.tolist() == [[0, 0, 0], pytest.approx([-1, 0, 1])]
    gradient, _ = step(method, group)
    assert norm(gradient) > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_names_its_reward(value, base) -> None:
    method = make(base, rewards=[Score(), Score(lambda sr: torch.full((len(sr),), value), name="broken")])
    with pytest.raises(TrainingError, match="'broken'"):
        method.prepare(images(), Draws(0, 0, [0]))
    # the pipeline is left as it was: our LoRA is on
    assert lora.active(method.adapter) == ["rewardsr"]


def test_a_group_that_hardly_differs_is_warned_about_once(base, caplog) -> None:
    method = make(base)
    method.prepare(images(), Draws(0, 0, [0]))
    assert not caplog.records
    method.adapter._start = lambda condition, generator: condition.latents  # as without noise
    for at in range(2):
        group = method.prepare(images(), Draws(0, at, [0]))
        assert group.metrics["group/pixel_std"] < 1e-6
    assert ["hardly differ" in record.message for record in caplog.records] == [True]


def test_shuffling_deals_out_the_advantages_within_each_group(base) -> None:
    plain, control = make(base, group_size=4), make(base, group_size=4, shuffle_advantages=True)
    moved = 0
    for at in range(6):
        ours, theirs = (method.prepare(images(2), Draws(0, at, [0, 1])) for method in (plain, control))
        assert torch.equal(ours.advantages.sort(1).values, theirs.advantages.sort(1).values)
        assert torch.equal(ours.latents, theirs.latents) and ours.metrics == theirs.metrics, "else the same run"
        moved += int((ours.advantages != theirs.advantages).any(1).sum())
    assert moved >= 6  # of 12 groups; one in 24 stays as it is by chance


def test_attribute_weighting_shares_one_by_the_texture_of_hq(base, monkeypatch) -> None:
    seen = {}

    def spy(scores, weights):
        seen.update(weights)
        return preferences.group_advantages(scores, weights)

    monkeypatch.setattr(groups, "group_advantages", spy)
    rewards = [Score(name="psnr"), Score(kind="detail", name="fine"), Score(kind="detail", name="crisp")]
    method = make(base, rewards=rewards, weighting="attribute")
    method.groups.weights = {"psnr": 2.0, "fine": 1.0, "crisp": 3.0}
    smooth = torch.full((3, 20, 20), 0.5)
    half = smooth.clone()
    half[:, :, :10] = torch.rand(3, 20, 10, generator=torch.Generator().manual_seed(0))
    hq = torch.stack([smooth, half])
    method.prepare(Batch(lq=torch.full((2, 3, 20, 20), 0.5), hq=hq), Draws(0, 0, [0, 1]))
    texture = texture_share(hq)
    assert texture.tolist() == [0, 0.5]
    assert torch.allclose(sum(seen.values()), torch.ones(2))
    assert torch.allclose(seen["psnr"], 1 - texture)
    assert torch.allclose(seen["fine"], texture / 4) and torch.allclose(seen["crisp"], texture * 3 / 4)
    with pytest.raises(TrainingError, match="needs HQ"):
        method.prepare(Batch(lq=torch.rand(1, 3, 20, 20)), Draws(0, 0, [0]))


def test_what_cannot_work_is_refused(base) -> None:
    flat = load_adapter("osediff", base, scale=1)
    lora.attach(flat)
    with pytest.raises(UserError, match="noise_t"):
        GDPO(flat, {"score": Score()}, {"score": 1.0}, GDPOOptions())
    with pytest.raises(UserError, match="shared_noise belongs to"):
        make(base, shared_noise=True)
    with pytest.raises(UserError, match="both kinds"):
        make(base, weighting="attribute")
    several = load_adapter("osediff", base, noise_t=250, net_t=100, scale=1)
    several.steps = (500, 100)
    with pytest.raises(UserError, match="takes 2 steps"):
        GDPO(several, {"score": Score()}, {"score": 1.0}, GDPOOptions(preference="conditional"))
    with pytest.raises(UserError, match="positive weight"):
        GDPO(make(base).adapter, {}, {}, GDPOOptions())
