"""GDPO on samplers of several steps: what is compared, by hand, what sampling costs, and that it teaches."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.draws import Replay
from rewardsr.testing import tiny_pipeline
from rewardsr.trainers.gdpo import GDPO, GDPOOptions
from rewardsr.trainers.groups import Group

LN2 = math.log(2)
GUIDED = ("sd_upscaler", "seesr")  # deterministic DDIM, ancestral DDPM
KINDS = (*GUIDED, "stablesr")  # and ancestral DDPM without guidance
STEPS, SIZE = 5, 3
PROMPTS = ("a cat", "a much longer text")


class Brightness:
    """How bright an output is, or how dark."""

    name, kind, needs_hq, differentiable, licence = "score", "fidelity", False, True, "Apache-2.0"

    def __init__(self, sign: float = 1.0) -> None:
        self._sign = sign

    def __call__(self, sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self._sign * sr.mean((1, 2, 3))


@pytest.fixture(scope="module")
def bases(tmp_path_factory, tiny_seesr) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    made = {"sd_upscaler": "upscaler", "stablesr": "stablesr"}
    return {kind: str(tiny_pipeline(folder / kind, family=family)) for kind, family in made.items()} | {
        "seesr": tiny_seesr
    }


@pytest.fixture
def make(bases):
    """The method on a tiny pipeline; `trained` fills the LoRA, so that policy and reference differ."""

    def made(kind: str, *, trained: bool = False, steps: int = STEPS, guidance: float = 3.0, sign=1.0, **options):
        more = {"tagger": "taggers:Means"} if kind == "seesr" else {}
        if kind in GUIDED:
            more["guidance"] = guidance
        adapter = load_adapter(kind, bases[kind], steps=steps, **more)
        lora.attach(adapter)
        if trained:
            random = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in lora.parameters(adapter).values():
                    parameter.copy_(0.03 * torch.randn(parameter.shape, generator=random))
        options = GDPOOptions(**{"group_size": SIZE, "beta": 50.0, **options})
        return GDPO(adapter, {"score": Brightness(sign)}, {"score": 1.0}, options)

    return made


def images(count: int = 2, side: int = 8) -> Batch:
    pixels = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))
    return Batch(lq=pixels, prompts=PROMPTS[:count])


def prepare(method: GDPO, count: int = 2, step: int = 0) -> Group:
    return method.prepare(images(count), Draws(0, step, range(count), "group"))


def update(method: GDPO, group: Group, draws=None) -> tuple[torch.Tensor, list]:
    """The LoRA's gradient, flat, and the losses; these are back-propagated one by one, as the loop does it."""
    own = lora.parameters(method.adapter)
    for parameter in own.values():
        parameter.grad = None
    losses = []
    for loss in method.losses(group, draws or Draws(0, 0, range(len(group.condition)), "update")):
        loss.value.backward()
        losses.append(loss)
    return torch.cat([parameter.grad.flatten() for parameter in own.values()]), losses


def given(group: Group, places: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss of a group is to draw: places in the schedule and noise, one each an image."""
    noise = torch.randn(len(places), *group.latents.shape[1:], generator=torch.Generator().manual_seed(8))
    return torch.tensor(places)[:, None], noise


def network_target(adapter, a, z0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What a perfect network of this adapter says: the noise, or the velocity sqrt(a) e - sqrt(1 - a) z0."""
    return a.sqrt() * noise - (1 - a).sqrt() * z0 if "v_prediction" in str(adapter.schedule) else noise


def recorded(adapter) -> list[tuple[int, int, bool]]:
    """(time, rows, whether our LoRA is on) of every prediction from now on."""
    calls: list[tuple[int, int, bool]] = []
    original = adapter._predict

    def call(z_t, t, condition):
        assert len(t) == len(z_t) and len(t.unique()) == 1
        calls.append((int(t[0]), len(z_t), bool(lora.active(adapter))))
        return original(z_t, t, condition)

    adapter._predict = call
    return calls


# ---- what is compared ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_shares_one_time_and_one_noise_and_groups_do_not(kind, make) -> None:
    method = make(kind)
    group = prepare(method)
    seen = set()
    for step in range(12):
        task = method.groups.task(group, Draws(0, step, [0, 1], "update"))
        noise = method.adapter.schedule.eps(task.z_t, task.target, task.t).unflatten(0, (2, SIZE))
        t = task.t.unflatten(0, (2, SIZE))
        assert torch.equal(t, t[:, :1].expand_as(t))
        assert torch.allclose(noise, noise[:, :1].expand_as(noise), atol=1e-5)
        assert not torch.equal(noise[0, 0], noise[1, 0])
        seen.add(tuple(t[:, 0].tolist()))
        assert abs(float(noise[:, 0].std()) - 1) < 0.2
    assert {time for pair in seen for time in pair} == set(method.adapter.steps)
    assert any(one != other for one, other in seen)
    again, other = (method.groups.task(group, Draws(0, 0, [0, 1], f"update-{number}")) for number in (0, 1))
    assert not torch.equal(again.target, other.target)  # several updates on a group do not repeat their noise


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_the_noise_on_the_outputs_own_latents(kind, make) -> None:
    method = make(kind)
    group = prepare(method)
    places, noise = given(group, (1, 4))
    draws = Replay([places, noise])
    task = method.groups.task(group, draws)
    assert draws.left == 0
    times = torch.tensor([method.adapter.steps[place] for place in (1, 1, 1, 4, 4, 4)])
    assert torch.equal(task.t, times)
    noise = noise[[0, 0, 0, 1, 1, 1]]
    a = method.adapter.schedule.alphas_cumprod[times][:, None, None, None]
    assert torch.allclose(task.z_t, a.sqrt() * group.latents + (1 - a).sqrt() * noise, atol=1e-6)
    assert torch.allclose(task.target, network_target(method.adapter, a, group.latents, noise), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("micro_batch", [None, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_fresh_lora_gives_exactly_ln_2_and_a_gradient(kind, micro_batch, checkpointing, make) -> None:
    """Policy and reference must run one numeric path: at beta 5000 a difference in the last bits would show."""
    method = make(kind, beta=5000, micro_batch=micro_batch)
    if checkpointing:
        assert method.adapter.enable_gradient_checkpointing() == []
    gradient, losses = update(method, prepare(method))
    wanted = {"loss": pytest.approx(LN2, abs=1e-7), "implicit_accuracy": 0, "distance": 0}
    assert all(loss.metrics == wanted for loss in losses)
    assert sum(loss.weight for loss in losses) == pytest.approx(1)
    assert gradient.isfinite().all() and float(gradient.norm()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(kind, make) -> None:
    """Row by row from the definition: DDPM's noising, unguided predictions, -logsigmoid of -beta/2 sum A (L - Lref)."""
    beta = 20.0
    method = make(kind, trained=True, beta=beta)
    adapter = method.adapter
    group = prepare(method)
    places, noise = given(group, (0, 3))
    _, (loss,) = update(method, group, Replay([places, noise]))
    logits = []
    with torch.no_grad():
        for image, place in enumerate((0, 3)):
            t, e = adapter.steps[place], noise[image : image + 1]
            a = adapter.schedule.alphas_cumprod[t]
            condition = group.condition.rows(slice(image, image + 1))
            total = 0.0
            for member in range(SIZE):
                z = group.latents[image * SIZE + member][None]
                z_t = a.sqrt() * z + (1 - a).sqrt() * e
                target = network_target(adapter, a, z, e)
                policy = float(((adapter.predict(z_t, t, condition) - target) ** 2).mean())
                with lora.reference(adapter):
                    reference = float(((adapter.predict(z_t, t, condition) - target) ** 2).mean())
                total += float(group.advantages[image, member]) * (policy - reference)
            logits.append(-beta / 2 * total)
    expected = float(-F.logsigmoid(torch.tensor(logits)).mean())
    assert max(map(abs, logits)) > 1e-3  # so that the numbers are not those of a fresh LoRA
    assert loss.metrics["loss"] == pytest.approx(expected, abs=1e-5)
    assert float(loss.value.detach()) == pytest.approx(expected, abs=1e-5)
    assert loss.metrics["implicit_accuracy"] == sum(logit > 0 for logit in logits) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_give_the_samples_and_the_gradient_of_the_whole(kind, make) -> None:
    method = make(kind, trained=True, beta=20)
    group = prepare(method)
    whole, (loss,) = update(method, group)
    assert abs(loss.metrics["loss"] - LN2) > 1e-4 and bool(whole.any())
    for micro_batch in (1, 2, 4):
        method.micro_batch = micro_batch
        parts, losses = update(method, group)
        assert float((parts - whole).norm() / whole.norm()) <= 1e-4, micro_batch
        logged = sum(float(part.metrics["loss"]) * part.weight for part in losses)
        assert logged == pytest.approx(float(loss.metrics["loss"]), abs=1e-5)
        again = prepare(method)
        assert torch.allclose(again.latents, group.latents, atol=1e-4)
        assert torch.allclose(again.advantages, group.advantages, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_does_not_depend_on_its_neighbours(kind, make) -> None:
    """So two processes with one image each equal one with two."""
    method = make(kind, trained=True, beta=20)
    both, _ = update(method, prepare(method))
    total = torch.zeros_like(both)
    for index in (0, 1):
        group = method.prepare(images().rows(torch.tensor([index])), Draws(0, 0, [index], "group"))
        gradient, _ = update(method, group, Draws(0, 0, [index], "update"))
        total += gradient / 2
    assert float((total - both).norm() / both.norm()) <= 1e-4


# ---- how a group is sampled ----


@pytest.mark.parametrize("kind", KINDS)
def test_members_differ_and_a_group_is_a_function_of_its_draws(kind, make) -> None:
    method = make(kind, trained=True)
    one, same, other = (prepare(method, step=step) for step in (0, 0, 1))
    assert torch.equal(one.latents, same.latents) and torch.equal(one.advantages, same.advantages)
    assert not torch.equal(one.latents, other.latents)
    members = one.latents.unflatten(0, (2, SIZE))
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert float((members[:, left] - members[:, right]).abs().mean()) > 0.05
    assert one.metrics["group/pixel_std"] > 1e-3 and one.metrics["group/tied"] == 0
    assert not one.latents.requires_grad
    assert torch.equal(prepare(make(kind)).latents, one.latents)  # of the reference: a LoRA does not matter


@pytest.mark.parametrize("kind", KINDS)
def test_few_sampling_steps_are_first_and_last_and_deterministic(kind, make) -> None:
    method = make(kind, sampling_steps=2, guidance=1)
    first, *_, last = method.adapter.steps
    calls = recorded(method.adapter)
    group = prepare(method)
    assert calls == [(first, 2 * SIZE, False), (last, 2 * SIZE, False)]
    assert torch.equal(prepare(method).latents, group.latents)
    whole = make(kind, guidance=1)
    calls = recorded(whole.adapter)
    longer = prepare(whole)
    assert [time for time, _, _ in calls] == list(whole.adapter.steps)
    assert not torch.allclose(longer.latents, group.latents, atol=1e-2)
    one = make(kind, sampling_steps=1, guidance=1)
    calls = recorded(one.adapter)
    prepare(one)
    assert [time for time, _, _ in calls] == [first]
    times = {int(t) for step in range(12) for t in method.groups.task(group, Draws(0, step, [0, 1])).t}
    assert times == set(method.adapter.steps)  # what is learnt is of all steps still


@pytest.mark.parametrize("kind", GUIDED)
def test_guidance_is_of_the_sampling_and_not_of_the_loss(kind, make) -> None:
    guided, plain = make(kind, trained=True, guidance=3.0), make(kind, trained=True, guidance=1)
    calls = recorded(guided.adapter)
    group = prepare(guided)
    assert calls == [(time, 2 * 2 * SIZE, False) for time in guided.adapter.steps]  # of both texts
    calls.clear()
    places, noise = given(group, (2, 2))
    _, (loss,) = update(guided, group, Replay([places, noise]))
    t = guided.adapter.steps[2]
    assert calls == [(t, 2 * SIZE, False), (t, 2 * SIZE, True)]  # the reference, and the policy
    assert not torch.allclose(prepare(plain).latents, group.latents, atol=1e-3)
    _, (other,) = update(plain, group, Replay([places, noise]))
    assert float(loss.value.detach()) == float(other.value.detach())


@torch.no_grad()
def test_a_group_is_sampled_as_at_inference(make) -> None:
    """The upscaler's, by hand: guided DDIM of the reference from the noise that was drawn."""
    method = make("sd_upscaler", trained=True, guidance=3.0)
    adapter = method.adapter
    group = prepare(method, 1)
    draws = Draws(0, 0, [0], "group")
    draws.take((1, 3, 8, 8), None)  # of the LQ image
    z, condition = draws.take((SIZE, 4, 8, 8), None), group.condition.repeat(SIZE)
    negative = replace(condition, text=condition.negative.expand_as(condition.text))
    alphas = adapter.schedule.alphas_cumprod
    with lora.reference(adapter):
        for t, following in zip(adapter.steps, (*adapter.steps[1:], 0), strict=True):  # it ends at the noise of time 0
            without, with_text = (adapter.predict(z, t, c) for c in (negative, condition))
            v = without + 3.0 * (with_text - without)
            x0 = alphas[t].sqrt() * z - (1 - alphas[t]).sqrt() * v
            eps = alphas[t].sqrt() * v + (1 - alphas[t]).sqrt() * z
            z = alphas[following].sqrt() * x0 + (1 - alphas[following]).sqrt() * eps
    assert torch.allclose(z, group.latents, atol=1e-4)


# ---- what it comes to ----


@torch.no_grad()
def policy_against_reference(method: GDPO, draws: int) -> torch.Tensor:
    """How much brighter the policy's output is than the reference's, for each draw of noise."""
    adapter = method.adapter

    def bright(number: int) -> torch.Tensor:
        source = Draws(1, number, [0], "look")
        return adapter.sample(adapter.encode(images(1), generator=source), source).mean()

    policy = torch.stack([bright(number) for number in range(draws)])
    with lora.reference(adapter):
        return policy - torch.stack([bright(number) for number in range(draws)])


def test_the_policy_learns_what_is_rewarded(make) -> None:
    """Brighter where brightness is rewarded and darker where darkness is, on noise that training has not seen."""
    for sign in (1.0, -1.0):
        method = make("sd_upscaler", steps=4, guidance=1, sign=sign, group_size=6, beta=100)
        parameters = list(lora.parameters(method.adapter).values())
        optimiser = torch.optim.AdamW(parameters, lr=1e-3)
        for step in range(20):
            group = prepare(method, 1, step)
            update(method, group, Draws(0, step, [0], "update"))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
        change = sign * policy_against_reference(method, 8)
        assert bool((change > 0).all()), change.tolist()
        assert float(change.mean()) > 1e-3


def test_what_several_steps_cannot_do_is_refused(make) -> None:
    for kind in KINDS:
        with pytest.raises(UserError, match=rf"'conditional' is for one-step .* '{kind}' takes 5 steps") as caught:
            make(kind, preference="conditional")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="shared_noise belongs to"):
        make("seesr", shared_noise=True)
    with pytest.raises(UserError, match="one-step"):
        make("sd_upscaler", preference="conditional", shared_noise=True)
