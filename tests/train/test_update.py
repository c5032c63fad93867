"""An update looks at the device once, holds back what is not finite, and takes less at once where memory is short."""

import json

import pytest
import torch
from runs import Brightness, content, weights

import rewardsr
from rewardsr import run_folder
from rewardsr.checks import check, gathered, read
from rewardsr.errors import TrainingError
from rewardsr.train.update import Means, _launched


def trained(count: int = 3) -> list[torch.nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(4, generator=random)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(4, generator=random)
    return made


@pytest.mark.parametrize("skip", [False, True])
def test_a_fused_optimiser_is_held_back_by_the_device_alone(skip) -> None:
    ours, theirs = trained(), trained()
    fused, plain = (torch.optim.AdamW(own, lr=0.1, fused=one) for own, one in ((ours, True), (theirs, True)))
    for step in range(3):
        held = skip and step == 1
        if held:  # what it is held back from must not reach a moment either
            for parameter in ours:
                parameter.grad.fill_(torch.nan)
        assert _launched(fused, torch.tensor(held))
        if held:
            for parameter, other in zip(ours, theirs, strict=True):
                parameter.grad.copy_(other.grad)
        else:
            plain.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert {int(fused.state[p]["step"]) for p in ours} == {2 if skip else 3}
    assert not hasattr(fused, "found_inf")


def test_other_optimisers_are_asked_to_wait() -> None:
    own = trained()
    before = [parameter.detach().clone() for parameter in own]
    assert not _launched(torch.optim.AdamW(own, lr=0.1), torch.tensor(False))
    assert all(torch.equal(one, other) for one, other in zip(before, own, strict=True))


def test_means_are_weighted_by_name_and_read_together() -> None:
    means = Means()
    means.add({"loss": torch.tensor(1.0), "share": 0.5}, 1)
    means.add({"loss": torch.tensor(4.0)}, 2)
    assert means.result() == {"loss": 3.0, "share": 0.5}
    assert means.not_finite([1.0, 0.5, float("inf")]) == "loss" and not means.not_finite([1.0, 0.5, 4.0])
    assert read([torch.tensor(0.1, dtype=torch.float64), 2, torch.tensor(True)]) == [0.1, 2.0, 1.0]


def test_checks_of_values_on_the_cpu_are_made_at_once_and_others_when_they_are_read() -> None:
    with gathered() as checks:
        check(torch.tensor(True), lambda: ValueError("no"))
        with pytest.raises(ValueError, match="at once"):
            check(torch.tensor(False), lambda: ValueError("at once"))
        assert checks.flags == []
        noted: list[str] = []
        check(torch.empty((), dtype=torch.bool, device="meta"), lambda: noted.append("a warning"))
        check(torch.empty((), dtype=torch.bool, device="meta"), lambda: ValueError("the second"))
        check(torch.empty((), dtype=torch.bool, device="meta"), lambda: ValueError("the third"))
        assert len(checks.flags) == 3 and noted == []
        with pytest.raises(ValueError, match="the second"):
            checks.judge([0.0, 0.0, 0.0])
        assert noted == ["a warning"] and checks.flags == []
    with pytest.raises(ValueError, match="outside"):
        check(torch.tensor(False), lambda: ValueError("outside"))


class Short(Brightness):
    """Memory runs out at some calls, counted from the first step on."""

    fails: tuple[int, ...] = ()
    calls = 0

    def __call__(self, sr, batch):
        type(self).calls += 1
        if self.calls - 2 in self.fails:  # the first call is the trial before training
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().__call__(sr, batch)


def run(folder, output: str, fails: tuple[int, ...], micro_batch: object):
    Short.fails, Short.calls = fails, 0
    options = {"group_size": 4, "preference": "conditional", "beta": 100.0, "micro_batch": micro_batch}
    recipe = content(folder, str(folder / "base"), output, steps=2, trainer_options=options)
    return rewardsr.finetune(recipe | {"rewards": [{"name": "test_update:Short"}], "guards": []}).output


def test_a_step_that_needs_too_much_is_taken_again_with_half_as_many_rows(folder, caplog) -> None:
    with caplog.at_level("WARNING", logger="rewardsr"):
        lowered = run(folder, "lowered", (0, 1), "auto")
    told = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert [line.rpartition(" with ")[2] for line in told] == ["2 rows at once", "1 rows at once"]
    state = json.loads((lowered / "checkpoints" / "step-00000002" / run_folder.STATE).read_text())
    assert state["micro_batch"] == 1 and state["skipped"] == 0
    same = run(folder, "same", (), 1)
    one, other = weights(lowered), weights(same)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("fails", "micro_batch"), [((0, 1, 2), "auto"), ((0,), 4), ((0,), None)])
def test_where_nothing_is_left_to_lower_the_advice_is_the_error(fails, micro_batch, folder) -> None:
    with pytest.raises(TrainingError, match=r"out of memory on cpu; .*gradient_checkpointing .*micro_batch"):
        run(folder, f"fails-{micro_batch}", fails, micro_batch)
