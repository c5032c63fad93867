"""Threads that make batches ahead: the same batches, errors at their turn, bounded memory, and an end that comes."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import ImageFile

from rewardsr.data import loader
from rewardsr.data.degrade.contract import make_degradation
from rewardsr.data.degrade.kernels import Sinc, filtered
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import Data, open_data
from rewardsr.data.images import read_image, read_pixels, write_image
from rewardsr.errors import UserError
from rewardsr.testing import write_images
from rewardsr.train.recipe import DegradationRecipe

LIGHT = Light(LightOptions(), 4)
WORKERS = [0, 1, 3]


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_images(tmp_path / "photos", 7, 48)


def opened(folder: Path, workers: int, **options) -> Data:
    return open_data(folder, **{"scale": 4, "crop": 32, "degradation": LIGHT, "workers": workers, **options})


def same(one, other) -> bool:
    return torch.equal(one.lq, other.lq) and torch.equal(one.hq, other.hq) and one.paths == other.paths


def stream(turn: int, size: int = 2) -> range:
    return range(turn * size, (turn + 1) * size)


# ---- the same batches ----


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("cache_mb", [0, 512])
def test_batches_do_not_depend_on_threads_or_on_what_was_announced(photos, workers, cache_mb) -> None:
    plain = [opened(photos, 0).batch(3, stream(turn)) for turn in range(12)]
    data = opened(photos, workers, cache_mb=cache_mb)
    for turn in range(12):
        assert same(data.batch(3, stream(turn)), plain[turn])
        data.prefetch(3, map(stream, count(turn + 1)))
    for turn in (5, 2, 11):  # others than announced, as after a resume
        assert same(data.batch(3, stream(turn)), plain[turn])
    assert not same(data.batch(4, stream(0)), plain[0])
    data.close()
    assert same(data.batch(3, stream(1)), plain[1])  # it goes on
    data.close()


class Smooth(Light):
    """Filters with Fourier transforms, whose last bits depend on threads, and does not round them away."""

    def __call__(self, hq, generators):
        return filtered(hq, [Sinc(21, 1.0)] * len(hq), 21)[..., ::4, ::4]


@pytest.mark.parametrize("name", ["light", "bicubic", "realesrgan", "smooth"])
def test_a_thread_computes_what_the_main_thread_does_with_several(tmp_path, name) -> None:
    """Threads of the loader use one of torch's; bits must not depend on that, and other threads not on them."""
    write_images(tmp_path / "large", 2, 560)
    smooth = Smooth(LightOptions(), 4)
    degradation = smooth if name == "smooth" else make_degradation(DegradationRecipe(name=name), 4)
    torch.set_num_threads(4)
    try:
        plain, threaded = (opened(tmp_path / "large", workers, crop=512, degradation=degradation) for workers in (0, 2))
        assert same(plain.batch(0, range(4)), threaded.batch(0, range(4)))
        assert same(plain.batch(0, [2]), threaded.batch(0, [1, 2]).rows(slice(1, 2)))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
        threaded.close()


def test_global_random_state_is_neither_used_nor_changed(photos) -> None:
    data = opened(photos, 2)
    state = torch.get_rng_state()
    data.batch(0, range(4))
    data.close()
    assert torch.equal(torch.get_rng_state(), state)


# ---- beside the step, and beside each other ----


class Meeting(Light):
    """Waits until so many samples are being made at once."""

    def __init__(self, parties: int) -> None:
        super().__init__(LightOptions(), 4)
        self.barrier = threading.Barrier(parties, timeout=30)

    def __call__(self, hq, generators):
        self.barrier.wait()
        return super().__call__(hq, generators)


def test_samples_of_one_batch_and_of_several_are_made_at_once(photos) -> None:
    data = opened(photos, 4, degradation=Meeting(4))
    assert len(data.batch(0, range(4))) == 4
    data.prefetch(0, [range(4, 6), range(6, 8)])
    assert len(data.batch(0, range(4, 6))) == 2 and len(data.batch(0, range(6, 8))) == 2
    data.close()


def test_files_are_decoded_at_once(photos, monkeypatch) -> None:
    """Each of the two threads waits in its first file until the other one is in one, too."""
    barrier, load = threading.Barrier(2, timeout=30), ImageFile.ImageFile.load
    inside: set[int] = set()

    def meet(self):
        if threading.get_ident() not in inside:
            inside.add(threading.get_ident())
            barrier.wait()
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", meet)
    data = opened(photos, 2)
    data.check()
    assert len(inside) == 2
    data.close()


def test_no_more_is_made_ahead_than_there_is_room_for(photos, monkeypatch) -> None:
    announced: list[int] = []

    def turns():
        for turn in count(1):
            announced.append(turn)
            yield stream(turn)

    for workers, bound, expected in ((0, 10**9, 0), (1, 10**9, 2), (4, 10**9, 4), (4, 3 * 24 * 32**2, 1)):
        monkeypatch.setattr(loader, "AHEAD_BYTES", bound)
        data = opened(photos, workers)
        announced.clear()
        data.prefetch(0, turns())
        assert len(data._workers._ahead) == expected
        assert len(announced) == (expected + 1 if workers else 0)
        data.prefetch(0, turns())
        assert len(data._workers._ahead) == expected
        data.close()


# ---- what goes wrong ----


@pytest.mark.parametrize("workers", WORKERS)
def test_an_unreadable_file_is_told_at_its_turn(photos, workers) -> None:
    data = opened(photos, workers, cache_mb=0)
    bad = data.item(0, 5).hq
    bad.write_bytes(bad.read_bytes()[:200])
    for turn in range(2):
        data.batch(0, stream(turn))
        data.prefetch(0, map(stream, count(turn + 1)))
    for _ in range(2):  # and again, where somebody goes on
        with pytest.raises(UserError, match=rf"{bad.name}': damaged, truncated"):
            data.batch(0, stream(2))
    assert same(data.batch(0, stream(3)), opened(photos, 0).batch(0, stream(3)))
    data.close()


@pytest.mark.parametrize("workers", WORKERS)
def test_the_check_names_all_damaged_files_in_order(photos, workers) -> None:
    data = opened(photos, workers)
    data.check()
    for number in (1, 4, 5, 6):
        path = photos / f"00{number}.png"
        path.write_bytes(path.read_bytes()[:300])
    data = opened(photos, workers)
    # The folder once, so that a line holds them all.
    with pytest.raises(
        UserError, match=rf"4 of 7 images are unreadable.*{photos}/001\.png'.*; '004\.png': .*; '005\.png': "
    ):
        data.check()
    data.check(limit=1)

    def together(work):  # of two processes, the other one has found something, too
        return [work(), [(0, "another's")]]

    with pytest.raises(UserError, match=r"3 of 7 images are unreadable.*: another's; .*004\.png.*006\.png"):
        data.check(0, 2, together=together)
    data.close()


def test_switches_of_pil_and_filters_of_warnings_are_as_they_were(photos, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = photos / "003.png"
    path.write_bytes(path.read_bytes()[:300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = list(warnings.filters)
        data = opened(photos, 3, cache_mb=0)
        for _ in range(3):
            with pytest.raises(UserError, match=r"1 of 7 images are unreadable"):
                data.check()
        data.close()
        assert warnings.filters == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_pixels_of_8_bits_stay_so(tmp_path) -> None:
    image = torch.randint(256, (3, 9, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = write_image(image.float() / 255, tmp_path / "a.png")
    assert read_pixels(path).dtype == torch.uint8 and torch.equal(read_pixels(path), image)
    assert torch.equal(read_image(path), image.float() / 255) and read_image(path).is_contiguous()


# ---- the end ----

LEAVES = """
import signal, sys, time
from itertools import count
from pathlib import Path
from rewardsr.data.degrade.contract import make_degradation
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import open_data

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background

class Slow(Light):
    def __call__(self, hq, generators):
        time.sleep(0.2)
        return super().__call__(hq, generators)

data = open_data(sys.argv[1], scale=4, crop=32, degradation=Slow(LightOptions(), 4), workers=2, cache_mb=0)
data.prefetch(0, ([number] for number in count()))
data.batch(0, [0])
print("ready", flush=True)
if sys.argv[2] == "interrupt":
    for number in count(1):
        data.batch(0, [number])
        data.prefetch(0, ([later] for later in count(number + 1)))
if sys.argv[2] == "raise":
    raise ValueError("something")
"""


@pytest.mark.parametrize("how", ["return", "raise", "interrupt"])
def test_a_process_ends_whatever_is_under_way(photos, how) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES, str(photos), how],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    if how == "interrupt":
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    expected = {"return": 0, "raise": 1, "interrupt": -signal.SIGINT}[how]
    assert process.returncode == expected, said
    assert {"return": "", "raise": "ValueError: something", "interrupt": "KeyboardInterrupt"}[how] in said


def test_threads_by_default(monkeypatch) -> None:
    cores = set(range(16))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores, raising=False)
    for said, expected in ((None, 8), ("1", 8), ("4", 3), ("16", 1), ("many", 8), ("0", 8)):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if said is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
        assert loader.default_workers() == expected
    cores = {0}
    assert loader.default_workers() == 1


def test_what_goes_to_a_card_is_pinned_and_not_waited_for(photos, monkeypatch) -> None:
    pinned: list[int] = []
    copies: list[bool] = []

    def pin(self):
        pinned.append(id(self))
        return self

    def to(self, device, non_blocking=False):
        copies.append(non_blocking)
        return self

    batch = replace(opened(photos, 0).batch(0, [0]), extras={"gray": torch.ones(1, 2)})
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch.to("cpu")
    assert (pinned, copies) == ([], [False] * 3)
    batch.to(torch.device("cuda", 0))
    assert pinned == [id(batch.lq), id(batch.hq), id(batch.extras["gray"])]
    assert copies[3:] == [True] * 3
