"""`check_trainer` finds what it is there to find, and says it."""

from contextlib import contextmanager
from dataclasses import replace

import pydantic
import pytest
import torch
from _data import DATA

from rewardsr.rewards.detail import Detail
from rewardsr.testing import check_trainer, tiny_pipeline
from rewardsr.testing.flow import TinyFlow
from rewardsr.trainers.base import ParameterGroup
from rewardsr.trainers.gdpo import GDPO
from rewardsr.trainers.groups import Group
from rewardsr.trainers.rfsr import RFSR

GROUPS_OF_TWO = {"group_size": 2, "preference": "conditional", "beta": 50}
NARROW = {"vgg": str(DATA / "vgg19_narrow.safetensors")}


class LooseOptions(GDPO):
    class Options(pydantic.BaseModel):
        group_size: int = 2


class OneName(GDPO):
    def parameters(self):
        (group,) = super().parameters()
        keys = list(group.parameters)
        halves = (keys[:10], keys[10:])
        return [ParameterGroup("lora", {key: group.parameters[key] for key in half}) for half in halves]


class Twice(GDPO):
    def parameters(self):
        (group,) = super().parameters()
        return [group, ParameterGroup("again", group.parameters)]


class Frozen(GDPO):
    def parameters(self):
        return [*super().parameters(), ParameterGroup("full", {"bias": self.adapter.unet.conv_in.bias})]


class GlobalDraws(GDPO):
    def prepare(self, batch, draws):
        group = super().prepare(batch, draws)
        return replace(group, latents=group.latents + torch.randn_like(group.latents))


class CarriesGradients(GDPO):
    def prepare(self, batch, draws):
        group = super().prepare(batch, draws)
        return replace(group, latents=group.latents.requires_grad_())


class Moves(GDPO):
    def prepare(self, batch, draws):
        with torch.no_grad():
            self._parameters[0].add_(1e-3)
        return super().prepare(batch, draws)


class YieldsInReference(GDPO):
    def losses(self, group, draws):
        for loss in super().losses(group, draws):
            with self.reference():
                yield loss


class YieldsInNoGrad(GDPO):
    def losses(self, group, draws):
        for loss in super().losses(group, draws):
            with torch.no_grad():
                yield loss


class NotFiniteLoss(GDPO):
    def losses(self, group, draws):
        for loss in super().losses(group, draws):
            yield replace(loss, value=loss.value * torch.inf)


class Constant(GDPO):
    def losses(self, group, draws):
        for loss in super().losses(group, draws):
            yield replace(loss, value=loss.value * 0)


class LeavesOut(GDPO):
    """Its first group is all that the losses reach."""

    def parameters(self):
        (group,) = super().parameters()
        idle = torch.nn.Parameter(torch.zeros(2))
        return [group, ParameterGroup("idle", {"weight": idle})]


class ReachesOut(GDPO):
    def parameters(self):
        (group,) = super().parameters()
        return [ParameterGroup("lora", dict(list(group.parameters.items())[1:]))]


class HalfWeights(GDPO):
    def losses(self, group, draws):
        for loss in super().losses(group, draws):
            yield replace(loss, weight=loss.weight / 2)


class OtherInChunks(GDPO):
    """The mean of the chunks' own losses is not the loss of the group."""

    def losses(self, group, draws):
        for loss in super().losses(group, draws):
            yield replace(loss, value=loss.value / loss.weight)


class ShipsForGood(GDPO):
    @contextmanager
    def shipped(self):
        with torch.no_grad():
            self._parameters[0].add_(1)
        yield


class Forgets(RFSR):
    def load_state_dict(self, state):
        pass


class StateOfNumbers(GDPO):
    def state_dict(self):
        return {"updates": 3}


class NoMetrics(GDPO):
    def prepare(self, batch, draws):
        return vars(super().prepare(batch, draws))

    def losses(self, group, draws):
        return super().losses(Group(**group), draws)


class Stops(GDPO):
    def prepare(self, batch, draws):
        raise ZeroDivisionError("of all things")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Detail, "is no subclass of rewardsr.trainers.base.Method"),
        (LooseOptions, "Options is no subclass of rewardsr.Options"),
        (OneName, "parameters: two groups have one name: lora, lora"),
        (Twice, "parameters: there are none, or one is in two groups"),
        (Frozen, "parameters: full/bias is frozen or in torch.float32"),
        (GlobalDraws, "prepare: equal batches and draws give different results"),
        (CarriesGradients, "prepare: its result carries gradients"),
        (Moves, "prepare: changes the weights of the pipeline"),
        (NoMetrics, "prepare: its result has no `metrics`"),
        (YieldsInReference, "losses: yields inside `reference`"),
        (YieldsInNoGrad, "losses: yields inside no_grad"),
        (NotFiniteLoss, "losses: one is not finite"),
        (Constant, "losses: the gradient of a fresh LoRA is zero or not finite"),
        (LeavesOut, "losses: no gradient reaches 1 of"),
        (ReachesOut, "which is in no group of `parameters`"),
        (HalfWeights, "losses: their weights add up to 0.5, expected 1"),
        (OtherInChunks, "losses: with micro_batch 1 the gradient is off by"),
        (ShipsForGood, "shipped: does not give the trained weights back"),
        (Forgets, "state_dict: a method that has loaded it ships other weights"),
        (StateOfNumbers, "state_dict: 'updates' is int, expected a tensor"),
        (Stops, "raised ZeroDivisionError: of all things"),
    ],
    ids=lambda entry: entry.__name__ if isinstance(entry, type) else "says",
)
def test_a_broken_trainer_is_caught(kind, says) -> None:
    with pytest.raises(AssertionError) as caught:
        check_trainer(kind, options=NARROW if kind is Forgets else GROUPS_OF_TWO)
    assert says in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (GDPO, {}),
        (GDPO, GROUPS_OF_TWO),
        (GDPO, GROUPS_OF_TWO | {"shared_noise": True}),
        (RFSR, NARROW),
        (RFSR, NARROW | {"reward_crop": 16, "ema": 0.0}),
    ],
    ids=str,
)
def test_the_built_in_trainers_pass(kind, options) -> None:
    check_trainer(kind, options=options)


@pytest.mark.parametrize(("kind", "options"), [(GDPO, {"group_size": 2}), (RFSR, NARROW)], ids=str)
def test_the_built_in_trainers_pass_on_a_flow_pipeline(tmp_path, kind, options) -> None:
    base = tiny_pipeline(tmp_path / "flow", family="flow")
    check_trainer(kind, TinyFlow.load(str(base), TinyFlow.Options(guidance=1.5)), options=options)
