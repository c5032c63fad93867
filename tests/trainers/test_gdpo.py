"""GDPO on a tiny pipeline: the maths of its forms, what a step costs, and what it refuses."""

import math

import pytest
import torch

from rewardsr import Batch, Draws, load_adapter, lora
from rewardsr.draws import Replay
from rewardsr.errors import TrainingError, UserError
from rewardsr.rewards.attribute import texture_share
from rewardsr.testing import tiny_pipeline
from rewardsr.trainers import gdpo, groups, preferences
from rewardsr.trainers.gdpo import GDPO, GDPOOptions

LN2 = math.log(2)
FORMS = [{"preference": "paper"}, {"preference": "conditional"}, {"preference": "conditional", "shared_noise": True}]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny_pipeline(tmp_path_factory.mktemp("base")))


class Score:
    """A reward given by a function of `sr`; by default how bright an output is."""

    needs_hq, differentiable, licence = False, True, "Apache-2.0"

    def __init__(self, function=None, kind: str = "fidelity", name: str = "score") -> None:
        self.name, self.kind, self.batches = name, kind, []
        self._function = function or (lambda sr: sr.mean((1, 2, 3)))

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        self.batches.append(batch)
        return self._function(sr)


def make(base: str, *, trained: bool = False, rewards=None, **options) -> GDPO:
    """The method on the tiny pipeline; `trained` fills the LoRA, so that policy and reference differ."""
    adapter = load_adapter("osediff", base, noise_t=250, net_t=100, scale=1)
    lora.attach(adapter)
    if trained:
        random = torch.Generator().manual_seed(3)
        for parameter in lora.parameters(adapter).values():
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=random)
    rewards = rewards or [Score()]
    named = {reward.name: reward for reward in rewards}
    return GDPO(adapter, named, dict.fromkeys(named, 1.0), GDPOOptions(**{"group_size": 3, "beta": 50.0, **options}))


def images(count: int = 1, side: int = 16) -> Batch:
    pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))
    return Batch(lq=pixels, hq=pixels, prompts=("a cat", "a much longer text", "a")[:count])


def step(method: GDPO, group: groups.Group, draws=None) -> tuple[dict[str, torch.Tensor], list[gdpo.Loss]]:
    """LoRA gradients and losses of one update; the losses are back-propagated one by one, as the loop does it."""
    own = lora.parameters(method.adapter)
    for parameter in own.values():
        parameter.grad = None
    losses = []
    for loss in method.losses(group, draws or Draws(0, 0, range(len(group.condition)), "update")):
        assert torch.is_grad_enabled()
        loss.value.backward()
        losses.append(loss)
    return {name: parameter.grad for name, parameter in own.items()}, losses


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
        assert all(loss.metrics == {"loss": pytest.approx(LN2, abs=1e-7), "implicit_accuracy": 0} for loss in losses)
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


def norm(gradient: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([value.norm() for value in gradient.values()]).norm())


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


def count_rows(adapter) -> list[int]:
    """Rows of each call of the UNet from now on."""
    calls: list[int] = []
    adapter.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


def recorded(adapter) -> list[tuple[str, int, bool]]:
    """(hook, rows, whether gradients are on) of every call of the networks from now on."""
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


def test_a_group_of_two(base) -> None:
    method = make(base, group_size=2)
    group = method.prepare(images(), Draws(0, 0, [0]))
    assert sorted(group.advantages[0].tolist()) == pytest.approx([-(0.5**0.5), 0.5**0.5])


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
