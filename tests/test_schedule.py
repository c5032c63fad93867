"""Schedules: what predictions mean, how latents are noised, one step of a sampler; against diffusers' schedulers."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from rewardsr.schedule import VP, Flow, fewer, shifted

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SHAPE = (3, 4, 5, 6)


def vp(prediction: str = "epsilon") -> VP:
    return VP(DDPMScheduler(**BETAS).alphas_cumprod, prediction)


SCHEDULES = {"epsilon": vp(), "velocity": vp("v_prediction"), "flow": Flow()}
TIMES = {"epsilon": (0, 1, 250, 999), "velocity": (0, 1, 250, 999), "flow": (0.004, 0.3, 0.86, 1.0)}
PLACES = [(name, t) for name in SCHEDULES for t in TIMES[name]]


@pytest.fixture
def latents() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z0, noise and a prediction (3, 4, 5, 6), all N(0, 1)."""
    random = torch.Generator().manual_seed(0)
    return tuple(torch.randn(SHAPE, generator=random) for _ in range(3))


def close(one: torch.Tensor, other: torch.Tensor, scale: float = 1.0) -> bool:
    return float((one - other).abs().max()) <= 1e-5 * scale


# ---- what a prediction means ----


@pytest.mark.parametrize(("name", "t"), PLACES)
def test_the_target_is_the_prediction_that_gives_back_what_was_noised(name, t, latents) -> None:
    schedule, (z0, noise, _) = SCHEDULES[name], latents
    z_t = schedule.add_noise(z0, noise, t)
    alpha, sigma = schedule.coefficients(t, z0)
    assert close(z_t, alpha * z0 + sigma * noise)
    target = schedule.target(z0, noise, t)
    assert close(schedule.x0(z_t, target, t), z0, 1 / max(alpha, 0.05))
    assert close(schedule.eps(z_t, target, t), noise)
    assert close(schedule.target_from(z_t, z0, t), target, 1 / sigma)


@pytest.mark.parametrize(("name", "t"), PLACES)
def test_x0_and_noise_of_any_prediction_make_up_the_latents(name, t, latents) -> None:
    schedule, (z_t, z0, prediction) = SCHEDULES[name], latents
    alpha, _ = schedule.coefficients(t, z_t)
    told = schedule.x0(z_t, prediction, t)
    assert close(schedule.add_noise(told, schedule.eps(z_t, prediction, t), t), z_t, 1 / max(alpha, 0.05))
    wanted = schedule.target_from(z_t, z0, t)
    assert close(schedule.x0(z_t, wanted, t), z0, 1 / max(alpha, 0.05))


def test_at_full_noise_a_flow_prediction_still_gives_z0_and_learns(latents) -> None:
    flow, (z_t, z0, prediction) = Flow(), latents
    assert torch.equal(flow.x0(z_t, prediction, 1.0), z_t - prediction)
    assert torch.equal(flow.eps(z_t, prediction, 1.0), z_t), "whatever the network says"
    assert torch.equal(flow.target_from(z_t, z0, 1.0), z_t - z0)
    prediction.requires_grad_()
    (gradient,) = torch.autograd.grad(flow.x0(z_t, prediction, torch.ones(3)).sum(), prediction)
    assert torch.equal(gradient, -torch.ones(SHAPE))


@pytest.mark.parametrize(("name", "t"), PLACES)
def test_times_of_rows_are_as_exact_as_a_number_for_all(name, t, latents) -> None:
    schedule, (z_t, _, prediction) = SCHEDULES[name], latents
    rows = schedule.times([t] * len(z_t))
    assert rows.dtype == schedule.dtype
    one = float(rows[0]) if name == "flow" else t  # in float32, as the tensor has it
    later = schedule.times([TIMES[name][0] / 2 if name == "flow" else 0] * len(z_t))
    for result in ("x0", "eps", "target", "target_from", "add_noise"):
        function = getattr(schedule, result)
        assert torch.equal(function(z_t, prediction, rows), function(z_t, prediction, one)), result
    for eta in (0, 1) if t > 0 else ():
        mean, std = schedule.transition(z_t, prediction, rows, later, eta)
        expected, expected_std = schedule.transition(z_t, prediction, one, later[0].item(), eta)
        # The variance of a number is computed in double precision.
        assert close(mean, expected) if eta else torch.equal(mean, expected)
        assert torch.allclose(torch.as_tensor(std), torch.as_tensor(expected_std), rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_row_has_its_own_time(name, latents) -> None:
    schedule, (z_t, _, prediction) = SCHEDULES[name], latents
    mixed = schedule.times(TIMES[name][1:4])
    each = [schedule.x0(z_t[i : i + 1], prediction[i : i + 1], mixed[i : i + 1]) for i in range(3)]
    assert torch.equal(schedule.x0(z_t, prediction, mixed), torch.cat(each))


def test_other_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction is 'sample', expected epsilon or v_prediction"):
        vp("sample")


# ---- one step of a sampler ----


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("t", "t_next"), [(980, 960), (500, 480), (20, 0)])
def test_without_noise_a_diffusion_step_is_ddim(prediction_type, t, t_next, latents) -> None:
    theirs = DDIMScheduler(**BETAS, prediction_type=prediction_type, set_alpha_to_one=False)
    theirs.set_timesteps(50)
    z_t, _, prediction = latents
    mean, std = vp(prediction_type).transition(z_t, prediction, t, t_next)
    expected = theirs.step(prediction, t, z_t).prev_sample
    assert std == 0 and close(mean, expected, float(expected.abs().max()))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_the_noise_of_a_diffusion_step_is_that_of_ddim(eta, latents) -> None:
    theirs = DDIMScheduler(**BETAS)
    theirs.set_timesteps(50)
    z_t, noise, prediction = latents
    mean, std = vp().transition(z_t, prediction, 500, 480, eta)
    expected = theirs.step(prediction, 500, z_t, eta=eta, variance_noise=noise).prev_sample
    assert close(mean + std * noise, expected, 5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("t", "t_next"), [(999, 998), (500, 499), (2, 1)])
def test_with_all_noise_a_diffusion_step_is_ancestral_ddpm(prediction_type, t, t_next, latents, monkeypatch) -> None:
    theirs = DDPMScheduler(**BETAS, prediction_type=prediction_type, variance_type="fixed_small")
    z_t, noise, prediction = latents
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise)
    expected = theirs.step(prediction, t, z_t).prev_sample
    mean, std = vp(prediction_type).transition(z_t, prediction, t, t_next, 1.0)
    assert std**2 == pytest.approx(float(theirs._get_variance(t)), rel=1e-3)
    assert close(mean + std * noise, expected, 10)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_step_goes_to_z0(name, eta, latents) -> None:
    schedule, (z_t, _, prediction) = SCHEDULES[name], latents
    for t in TIMES[name]:
        mean, std = schedule.transition(z_t, prediction, t, schedule.end, eta)
        assert std == 0 and torch.equal(mean, schedule.x0(z_t, prediction, t))
    assert schedule.coefficients(schedule.end, z_t) == (1, 0)


# ---- flow as Stable Diffusion 3 has it: golden vectors ----


@pytest.mark.parametrize("count", [1, 2, 4, 10, 28])
def test_shifted_times_are_those_of_stable_diffusion_3(count, golden) -> None:
    v = golden("flow_scheduler")
    # diffusers spaces times between ends that are shifted already, and shifts them again.
    times = shifted(torch.linspace(1, float(shifted(0.001, 3.0)), count), 3.0)
    assert float((times - v[f"n{count}.sigmas"][:-1]).abs().max()) < 1e-6
    assert float((times - v[f"n{count}.timesteps"] / 1000).abs().max()) < 1e-6


def test_flow_adds_noise_as_recorded(golden) -> None:
    v = golden("flow_scheduler")
    z_t = Flow().add_noise(v["scale_noise.x0"], v["scale_noise.noise"], v["scale_noise.t"] / 1000)
    assert float((z_t - v["scale_noise.x_t"]).abs().max()) < 1e-6


def test_without_noise_a_flow_step_is_eulers(golden) -> None:
    v = golden("flow_scheduler")
    t, t_next = (float(time) for time in v["n10.sigmas"][3:5])
    mean, std = Flow().transition(v["step.x_t"], v["step.v"], t, t_next)
    assert std == 0 and float((mean - v["step.prev"]).abs().max()) < 1e-6


def test_the_noise_of_a_flow_step_keeps_the_amount_of_noise(latents) -> None:
    z_t, _, prediction = latents
    mean, std = Flow().transition(z_t, prediction, 0.8, 0.6, 1.0)
    left = (mean - (1 - 0.6) * Flow().x0(z_t, prediction, 0.8)) / Flow().eps(z_t, prediction, 0.8)
    assert 0 < std < 0.6 and close(left**2 + std**2, torch.full(SHAPE, 0.36))


# ---- fewer steps ----


def test_fewer_times_keep_both_ends_and_their_order() -> None:
    times = tuple(range(999, -1, -20))
    assert fewer(times, 99) == times and fewer(times, 1) == (999,)
    few = fewer(times, 7)
    assert len(few) == 7 and few[0] == times[0] and few[-1] == times[-1]
    assert all(one > other for one, other in pairwise(few)) and set(few) <= set(times)
