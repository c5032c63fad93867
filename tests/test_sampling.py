"""Sampling of any adapter: what shares a network call, and which rows go how far."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rewardsr import Batch, Draws, load_adapter
from rewardsr.adapter import ISRAdapter
from rewardsr.batch import Condition, parts

STEPS = 3


@pytest.fixture
def seesr(data):
    """SeeSR's tiny networks: guided, with noise at each step, and on request in tiles."""

    def made(**options) -> ISRAdapter:
        return load_adapter("seesr", data / "tiny_seesr", scale=1, steps=STEPS, **options)

    return made


def condition(adapter: ISRAdapter, rows: int, side: int = 32) -> Condition:
    random = torch.Generator().manual_seed(1)
    images, tokens = torch.rand(rows, 3, side, side, generator=random), torch.randn(rows, 10, 512, generator=random)
    prompts = ("a cat", "two dogs", "", "sea")[:rows]
    return adapter.encode(Batch(images, prompts=prompts, extras={"ram": tokens}), generator=Draws(0, 0, range(rows)))


def sampled(adapter: ISRAdapter, given: Condition, **options) -> torch.Tensor:
    with torch.no_grad():
        return adapter.sample_latents(given, Draws(0, 1, range(len(given))), **options)


def rows_of(adapter: ISRAdapter) -> list[int]:
    """Rows of each network call from now on."""
    rows: list[int] = []
    predict = adapter._predict

    def call(z_t, t, where):
        assert len(z_t) == len(t) == len(where)
        rows.append(len(z_t))
        return predict(z_t, t, where)

    adapter._predict = call
    return rows


@pytest.mark.parametrize(
    ("rows", "calls"), [(None, [4]), (100, [4]), (4, [4]), (3, [2, 2]), (2, [2, 2]), (1, [1, 1, 1, 1])]
)
def test_guidance_is_one_batch_within_the_bound(rows, calls, seesr) -> None:
    adapter = seesr()
    given = condition(adapter, 2)
    z = adapter.start(given, Draws(0, 1, [0, 1]))
    with torch.no_grad():
        c, u = (adapter.predict(z, 999, one) for one in (given, replace(given, text=given.negative)))
        assert float((c - u).abs().max()) > 0.01
        assert torch.allclose(adapter._guided(z, 999, given, 3.0, rows), u + 3 * (c - u), atol=1e-5)
    seen = rows_of(adapter)
    whole = sampled(adapter, given)
    seen.clear()
    assert torch.allclose(sampled(adapter, given, rows=rows), whole, atol=1e-4)
    assert seen == calls * STEPS


@pytest.mark.parametrize(("guidance", "rows_each"), [(1, 2), (5.5, 4)])
@pytest.mark.parametrize(("tile_batch", "calls"), [(1, [1] * 9), (4, [3] * 3), (9, [9])])
def test_tiles_of_an_image_go_together(tile_batch, calls, guidance, rows_each, seesr) -> None:
    adapter = seesr(tile=4, tile_overlap=2, tile_batch=tile_batch, guidance=guidance)
    single = seesr(tile=4, tile_overlap=2, tile_batch=1, guidance=guidance)
    given = condition(adapter, 2, side=64)
    seen = rows_of(adapter)
    latents = sampled(adapter, given)
    assert seen == [tiles * rows_each for tiles in calls] * STEPS
    assert torch.allclose(latents, sampled(single, given), atol=1e-4)


def test_rows_bound_tiles_too(seesr) -> None:
    adapter = seesr(tile=4, tile_overlap=2, tile_batch=4)
    given = condition(adapter, 2, side=64)
    seen = rows_of(adapter)
    bounded = sampled(adapter, given, rows=5)
    assert max(seen) <= 5
    assert torch.allclose(bounded, sampled(adapter, given), atol=1e-4)


def test_rows_stop_where_they_are_told_to(seesr) -> None:
    """Each row as if it were alone, with the noise that it would have had."""
    adapter = seesr()
    given = condition(adapter, 4)
    until = torch.tensor([2, 0, 3, 1])
    seen = rows_of(adapter)
    stopped = sampled(adapter, given, until=until)
    assert seen == [6, 4, 2]
    for row, last in enumerate(until.tolist()):
        own = given.rows(slice(row, row + 1))
        times = adapter.steps
        draws = Draws(0, 1, [row])
        with torch.no_grad():
            z = adapter.start(own, draws)
            for t, t_next in list(zip(times, (*times[1:], adapter.schedule.end), strict=True))[:last]:
                z, std = adapter.transition(z, adapter._guided(z, t, own, None), t, t_next)
                z = z + std * draws.take(tuple(z.shape), None) if std > 0 else z
        assert torch.allclose(stopped[row], z[0], atol=1e-4), row
    assert torch.equal(sampled(adapter, given, until=torch.full((4,), STEPS)), sampled(adapter, given))


class Operations(TorchDispatchMode):
    """Names of what torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_which_rows_go_on_is_no_question_to_the_device(seesr) -> None:
    """An index would have to be copied to a card, and a card would have to be waited for to read one."""
    adapter = seesr()
    given = condition(adapter, 3)
    with Operations() as seen:
        sampled(adapter, given, until=torch.tensor([1, 3, 2]))
    assert "convolution" in seen.names
    assert not seen.names & {"nonzero", "index", "index_copy", "index_select"}


@pytest.mark.parametrize(
    ("count", "most", "lengths"),
    [(6, None, [6]), (6, 6, [6]), (6, 7, [6]), (6, 4, [3, 3]), (7, 4, [3, 4]), (5, 2, [1, 2, 2]), (3, 1, [1, 1, 1])],
)
def test_parts_are_few_and_alike(count, most, lengths) -> None:
    found = parts(count, most)
    assert [part.stop - part.start for part in found] == lengths
    assert [row for part in found for row in range(count)[part]] == list(range(count))
