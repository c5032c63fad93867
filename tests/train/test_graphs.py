"""Recorded network calls: what comes of the bookkeeping, with a recorder that repeats by computing again.

That a card's graphs repeat what was recorded is seen in test_gpu.py.
"""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from runs import content

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.options import parse
from rewardsr.train import loop
from rewardsr.train.graphs import MOST, Graphs, as_written
from rewardsr.train.optimiser import make_optimiser
from rewardsr.train.prepare import set_up
from rewardsr.train.recipe import Recipe


class Again:
    """Repeats work by doing it again: on the tensors where they were, as a graph does."""

    def __init__(self) -> None:
        self.replays: list[object] = []
        self.pools = 0

    def pool(self) -> int:
        self.pools += 1
        return self.pools

    def record(self, function, pool):
        function()
        method = weakref.WeakMethod(function)  # as with a card's graph, which does not know whose method it was

        def replay() -> None:
            self.replays.append(pool)
            method()()

        return replay


class Calls:
    """Calls of an adapter that is written as it is, and of the same with graphs."""

    def __init__(self, kind: str, base: str) -> None:
        more = {"seesr": {"tagger": "taggers:Means", "steps": 3}, "osediff": {"noise_t": 250}}.get(kind, {"steps": 3})
        self.adapter = load_adapter(kind, base, **more)
        lora.attach(self.adapter)
        self.weights = list(lora.parameters(self.adapter).values())
        self.move(0)
        self.recorder = Again()
        self.graphs = Graphs(self.adapter, self.weights, self.recorder)

    def move(self, seed: int) -> None:
        """Other weights, in place, as an optimiser does it."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.weights:
                weight.copy_(0.03 * torch.randn(weight.shape, generator=random))

    def given(self, seed: int, rows: int = 2):
        lq = torch.rand(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            condition = self.adapter.encode(Batch(lq=lq), generator=Draws(seed, 0, range(rows)))
            return self.adapter.start(condition, Draws(seed, 1, range(rows))), self.adapter.net_t, condition

    def predict(self, *given):
        """With graphs."""
        self.adapter.network_call = self.graphs
        try:
            return self.adapter.predict(*given)
        finally:
            self.adapter.network_call = None

    def gradient(self, prediction) -> torch.Tensor:
        for weight in self.weights:
            weight.grad = None
        prediction.square().sum().backward()
        return torch.cat([weight.grad.flatten() for weight in self.weights])

    def agree(self, seed: int) -> None:
        """Policy, its gradient, and reference are what they are without graphs, bit for bit."""
        given = self.given(seed)
        recorded, written = self.predict(*given), self.adapter.predict(*given)
        assert torch.equal(recorded, written)
        assert torch.equal(self.gradient(recorded), self.gradient(written))
        with lora.reference(self.adapter):
            reference = self.predict(*given)
            assert torch.equal(reference, self.adapter.predict(*given)) and not reference.requires_grad
        assert not torch.equal(reference, recorded)


@pytest.fixture
def calls(bases) -> Calls:
    return Calls("osediff", bases["osediff"])


@pytest.mark.parametrize("kind", ["osediff", "sd_upscaler", "seesr", "stablesr"])
def test_replays_give_what_the_call_gives(kind, bases) -> None:
    calls = Calls(kind, bases[kind])
    calls.agree(0)
    assert not calls.recorder.replays, "the first call of a kind runs as written"
    for seed in (1, 2):
        calls.move(seed)
        calls.agree(seed)
    assert len(calls.recorder.replays) == 2 * 3, "policy, its gradient, reference"


def test_gradients_of_several_calls_add_up(calls) -> None:
    """A weight keeps the first gradient that it is given as its own: that must not be the graph's memory."""
    found = []
    for predict in (calls.adapter.predict, calls.predict, calls.predict):
        for weight in calls.weights:
            weight.grad = None
        for seed in (0, 1, 2):
            predict(*calls.given(seed)).square().sum().backward()
        found.append(torch.cat([weight.grad.flatten() for weight in calls.weights]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len(calls.recorder.replays) == 2 * 5


def test_gradients_reach_the_condition(calls) -> None:
    """As where an encoder is trained, too."""
    found = []
    for predict in (calls.predict, calls.predict, calls.adapter.predict):
        z_t, t, condition = calls.given(5)
        text = condition.text.clone().requires_grad_()
        z_t.requires_grad_()
        with_text = condition.with_tensors([text, *condition.tensors()[1:]])
        found.append(torch.autograd.grad(predict(z_t, t, with_text).square().sum(), [z_t, text]))
    assert len(calls.recorder.replays) == 2
    for recorded, written in zip(found[1], found[2], strict=True):
        assert torch.equal(recorded, written) and bool(recorded.any())


def test_a_call_whose_gradients_are_still_wanted_keeps_its_graph(calls) -> None:
    first, second = calls.given(0), calls.given(1)
    calls.predict(*first)
    one, other = calls.predict(*first), calls.predict(*second)
    assert len(calls.recorder.replays) == 1, "the second of them ran as written"
    assert torch.equal(calls.gradient(one), calls.gradient(calls.adapter.predict(*first)))
    assert torch.equal(calls.gradient(other), calls.gradient(calls.adapter.predict(*second)))
    replays = len(calls.recorder.replays)
    calls.predict(*second)
    assert len(calls.recorder.replays) == replays + 1, "it is free again"


def test_a_call_that_nobody_differentiates_gives_its_graph_back(calls) -> None:
    given = calls.given(0)
    for _ in range(3):
        calls.predict(*given)
        gc.collect()
    assert len(calls.recorder.replays) == 2


def test_gradients_cannot_be_had_twice(calls) -> None:
    given = calls.given(0)
    calls.predict(*given)
    loss = calls.predict(*given).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be had once"):
        loss.backward()


def test_each_kind_of_call_has_its_own_graph(calls) -> None:
    def call(rows: int, gradients: bool) -> None:
        with torch.set_grad_enabled(gradients):
            calls.predict(*calls.given(0, rows))

    def twice(rows: int, gradients: bool) -> int:
        before = len(calls.recorder.replays)
        call(rows, gradients)
        call(rows, gradients)
        return len(calls.recorder.replays) - before

    assert [twice(2, True), twice(2, False), twice(3, True)] == [1, 1, 1]
    lora.set_scale(calls.adapter, 0.5)
    assert twice(2, True) == 1
    calls.weights[0].data = calls.weights[0].data.clone()
    assert twice(2, True) == 1
    assert len(set(calls.recorder.replays)) == 5, "calls with gradients do not share memory"
    assert twice(2, True) == 2


def test_graphs_are_bounded(calls) -> None:
    with torch.no_grad():
        for rows in (*range(1, MOST + 3), *range(1, MOST + 3)):
            calls.predict(*calls.given(0, rows))
    assert len(calls.recorder.replays) == MOST


def test_graphs_that_are_replaced_are_gone_at_once(calls) -> None:
    """They hold most of what a card has; nobody waits for the collector there."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            calls.gradient(calls.predict(*calls.given(0)))
        graphs = [weakref.ref(graph) for graph in calls.graphs._known.values()]
        assert len(graphs) == 1 and graphs[0]() is not None
        calls.graphs = Graphs(calls.adapter, calls.weights, calls.recorder)
        assert graphs[0]() is None
    finally:
        gc.enable()


def test_a_call_that_cannot_be_recorded_is_one_line(calls, monkeypatch) -> None:
    def refuse(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing\n and more")

    monkeypatch.setattr(calls.recorder, "record", refuse)
    calls.predict(*calls.given(0))
    with pytest.raises(UserError, match=r"adapter 'osediff' cannot be recorded: .*set cuda_graphs=false"):
        calls.predict(*calls.given(0))
    monkeypatch.setattr(calls.recorder, "record", lambda function, pool: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        calls.predict(*calls.given(0))


def test_steps_with_graphs_are_the_steps_without(folder) -> None:
    """A run's own steps: sampling, reference, policy, and held-out images that are not recorded."""
    ends = []
    for graphs in (False, True):
        setup = set_up(parse(Recipe, content(folder, str(folder / "base")), "test"))
        recorder = Again()
        weights = list(setup.method.trained_weights().values())
        if graphs:
            setup.adapter.network_call = Graphs(setup.adapter, weights, recorder)
        optimiser, state = make_optimiser(setup), loop.State()
        for _ in range(3):
            loop.step(setup, optimiser, state)
        ends.append([weight.detach().clone() for weight in weights])
        replayed = len(recorder.replays)
        assert replayed == (2 * 4 if graphs else 0), "in two steps: sampling, reference, policy, its gradient"
        with as_written(setup.adapter):
            assert setup.adapter.network_call is None
        assert (setup.adapter.network_call is not None) == graphs
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_graphs_need_cuda(folder, tmp_path: Path) -> None:
    recipe = parse(Recipe, content(folder, str(folder / "base")) | {"cuda_graphs": True, "device": "cpu"}, "test")
    with pytest.raises(UserError, match="cuda_graphs needs a CUDA device, and this run is on cpu: leave it out"):
        set_up(recipe)
