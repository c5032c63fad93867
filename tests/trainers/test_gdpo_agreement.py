"""Agreement of GDPO's losses, advantages and gradients with vectors measured on GDPO-SR."""

import json

import pytest
import torch
from _support import picked

from rewardsr import Batch, load_adapter, lora
from rewardsr.draws import Replay
from rewardsr.trainers.gdpo import GDPO, GDPOOptions
from rewardsr.trainers.groups import Group
from rewardsr.trainers.preferences import gdpo_loss, group_advantages, preference_logit


def errors(prediction: torch.Tensor, noise: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return (prediction - noise).square().mean((1, 2, 3)).reshape(shape)


@pytest.mark.parametrize("case", ["b1_g2", "b1_g6", "b2_g2", "b2_g8"])
def test_loss_and_gradient(case, data, golden) -> None:
    v = {
        key.removeprefix(f"{case}."): value for key, value in golden("gdpo_loss").items() if key.startswith(f"{case}.")
    }
    prediction = v["model_pred"].clone().requires_grad_()
    shape = tuple(v["rewards"].shape)
    policy, reference = (errors(made, v["noise"], shape) for made in (prediction, v["ref_model_pred"]))
    loss, accuracy = gdpo_loss(preference_logit(policy, reference, v["rewards"], 5000))
    loss.backward()
    assert abs(float(loss) - float(v["gdpo_loss"])) <= 5e-4
    assert float(accuracy) == float(v["implicit_acc"])
    relative = (prediction.grad - v["grad_model_pred"]).norm() / v["grad_model_pred"].norm()
    assert float(relative) <= 1e-3


def test_equal_policy_and_reference_give_ln_2() -> None:
    same = torch.rand(2, 6)
    loss, accuracy = gdpo_loss(preference_logit(same, same, torch.randn(2, 6), 5000))
    assert abs(float(loss) - 0.6931472) < 1e-7
    assert float(accuracy) == 0


@pytest.mark.parametrize(
    "case", ["b1_g6", "b2_g2", "all_equal", "psnr_equal_with_zero_weight", "group_of_one", "opposing_constant_sum"]
)
def test_advantages(case, data, golden) -> None:
    v = {key.removeprefix(f"{case}."): value for key, value in golden("reward_combination").items()}
    weights = {"psnr": v["fidelity"], "maniqa": v["detail"] / 2, "musiq": v["detail"] / 2}
    advantages = group_advantages({name: v[name] for name in weights}, weights)
    theirs = v["advantage"]
    if theirs.isfinite().all():
        assert float((advantages - theirs).abs().max()) <= 1e-5
    else:  # the original's ties are NaN; a constant metric contributes nothing here, and the others count
        assert advantages.isfinite().all()
        varying = [name for name in weights if (v[name].amax(1) > v[name].amin(1)).any()]
        assert (advantages != 0).any() == bool(varying)


def released_names(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors stored under the original's adapter names, by our names in the file."""
    found = {}
    for key, value in tensors.items():
        if key.startswith(prefix) and ".lora_" in key:
            module, _, rest = key.removeprefix(prefix).partition(".lora_")
            found[f"unet.{module}.lora_{rest[0]}.weight"] = value
    return found


def run_step(case: str, tiny, data, golden, micro_batch: int | None):
    """Our own step on the recorded draws; rewards as recorded."""
    v = golden(case)
    adapter = load_adapter("osediff", tiny, noise_t=250, net_t=100, scale=1)
    if case == "gdpo_step_b1":
        lora.load(adapter, data / "gdpo_model.pkl")
        with torch.no_grad():
            for name, parameter in lora.parameters(adapter).items():
                if ".lora_B." in name:
                    parameter.mul_(0.015625)
    else:
        lora.attach(adapter, 4, 8)
        before = released_names(v, "before/")
        lora.load_state_dict(
            adapter, {name: before.get(name, torch.zeros_like(p)) for name, p in lora.parameters(adapter).items()}
        )
    order = []

    def recorded_scores(sr: torch.Tensor, batch: Batch) -> torch.Tensor:
        order.append(sr)
        return v["rewards"].flatten()  # already standardised: min-max and z-score leave a z-score as it is

    recorded_scores.kind, recorded_scores.light = "fidelity", True  # all at once
    method = GDPO(adapter, {"recorded": recorded_scores}, {"recorded": 1.0}, GDPOOptions(micro_batch=micro_batch))
    d = golden("gdpo_step_b1")  # all cases were recorded on one image with the same draws
    draws = Replay([d["ref.posterior_eps"], d["ref.noise"].flatten(0, 1), d["fwd.posterior_eps"], d["fwd.noise"]])
    prompt = json.loads((data / "gdpo_reference.json").read_text())["prompts"][0]
    image = d["lr_u8"] / 255 * 2 - 1  # as the original has it
    group = method.prepare(Batch(lq=(image + 1) / 2, prompts=(prompt,)), draws)
    losses = list(method.losses(group, draws))
    for loss in losses:
        loss.value.backward()
    assert draws.left == 0
    return adapter, group, losses, order[0], v


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("case", ["gdpo_step_b1", "gdpo_step_init"])
def test_step_gradients(case, micro_batch, tiny, data, golden) -> None:
    adapter, group, losses, sr, v = run_step(case, tiny, data, golden, micro_batch)
    assert float((group.advantages - v["rewards"]).abs().max()) <= 1e-5
    if case == "gdpo_step_b1":
        samples, theirs = picked(sr * 2 - 1, v, "samples")
        assert float((samples - theirs).abs().max()) <= 2e-5
    assert abs(losses[0].metrics["loss"] - float(v["gdpo_loss"])) <= 5e-4
    theirs = released_names(v, "grad/")
    ours = {name: p.grad for name, p in lora.parameters(adapter).items()}
    assert len(ours) == 146
    assert set(theirs) == (set(ours) if case == "gdpo_step_b1" else {name for name in ours if ".lora_B." in name})
    flat_ours = torch.cat([ours[name].flatten() for name in theirs])
    flat_theirs = torch.cat([value.flatten() for value in theirs.values()])
    assert float((flat_ours - flat_theirs).norm() / flat_theirs.norm()) <= 5e-3
    # The rest of the difference is that of s, which float32 cancellation moves; its factor taken out, 1e-4 holds.
    factor = float(torch.sigmoid(-v["inside_term"])) / (1 - torch.exp(-losses[0].metrics["loss"])).item()
    assert float((flat_ours * factor - flat_theirs).norm() / flat_theirs.norm()) <= 1e-4
    if case == "gdpo_step_init":
        assert all(not p.grad.any() for name, p in lora.parameters(adapter).items() if ".lora_A." in name)


def test_one_clipped_adamw_step(tiny, data, golden) -> None:
    adapter, _, _, _, v = run_step("gdpo_step_b1", tiny, data, golden, None)
    own = lora.parameters(adapter)
    theirs = released_names(v, "grad/")
    for name, parameter in own.items():
        parameter.grad = theirs[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
    assert abs(float(norm) / float(v["grad_norm"]) - 1) <= 1e-5
    torch.optim.AdamW(own.values(), lr=5e-5, weight_decay=0.01).step()
    for name, value in released_names(v, "after/").items():
        assert float((own[name] - value).abs().max()) <= 1e-7, name


def test_group_reports_are_single_numbers(tiny, data, golden) -> None:
    _, group, losses, _, _ = run_step("gdpo_step_b1", tiny, data, golden, None)
    assert isinstance(group, Group)
    told = {**group.metrics, **losses[0].metrics}.values()
    assert all(value.ndim == 0 and not value.requires_grad and bool(value.isfinite()) for value in told)
