"""Writing whole networks, and reading pickles: bars of bytes."""

import re

import pytest
import torch
from diffusers import AutoencoderKL

from rewardsr import progress
from rewardsr.weights import read_pickle, write_networks


@pytest.fixture
def counts(capfd, monkeypatch):
    """Megabytes that each line tells of, as (done, total)."""
    monkeypatch.setattr(progress, "SELDOM", 0)
    return lambda: re.findall(r" (\d+\.\d)/(\d+\.\d) MB  ", capfd.readouterr().err)


def test_networks_are_counted_as_they_are_written(tmp_path, counts) -> None:
    network = AutoencoderKL(block_out_channels=(32, 32), norm_num_groups=8)
    write_networks({"one": network, "two": network}, tmp_path)
    assert [float(done) / float(total) for done, total in counts()] == pytest.approx([0.5, 1], abs=0.05)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_of_a_pickle_are_counted_as_they_are_read(tmp_path, counts, zipped) -> None:
    tensors = {str(number): torch.full((250_000,), float(number)) for number in range(4)}
    torch.save({"state": tensors}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_pickle(tmp_path / "a.ckpt")["state"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    told = counts()
    if zipped:
        assert told[-1] == ("4.0", "4.0") and {count for count, _ in told} >= {"1.0", "2.0", "3.0"}
