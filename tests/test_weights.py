"""Writing whole networks, and reading pickles: the same files and tensors, and a bar of bytes."""

import json
import re

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file

from rewardsr import progress
from rewardsr.weights import read_pickle, write_networks


@pytest.fixture
def counts(capfd, monkeypatch):
    """Megabytes that each line tells of, as (done, total)."""
    monkeypatch.setattr(progress, "SELDOM", 0)
    return lambda: re.findall(r" (\d+\.\d)/(\d+\.\d) MB  ", capfd.readouterr().err)


def test_networks_are_written_as_diffusers_writes_them(tmp_path, counts) -> None:
    network = AutoencoderKL(block_out_channels=(64, 64), norm_num_groups=8)
    network.encoder.half()
    network.decoder.to(torch.bfloat16)
    network.register_buffer("steps", torch.tensor(7))
    network.register_buffer("mask", torch.tensor([True, False, True]))
    network.register_buffer("turned", torch.arange(6.0).reshape(2, 3).T)
    write_networks({"vae": network}, tmp_path)
    told = counts()
    network.save_pretrained(tmp_path / "theirs")
    ours, theirs = (tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("vae", "theirs"))
    assert sorted(path.name for path in ours.parent.iterdir()) == sorted(path.name for path in theirs.parent.iterdir())
    assert json.loads((ours.parent / "config.json").read_text()) == json.loads(
        (theirs.parent / "config.json").read_text()
    )
    found, expected = load_file(ours), load_file(theirs)
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == expected[name].dtype for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with safe_open(ours, "pt") as one, safe_open(theirs, "pt") as other:
        assert one.metadata() == other.metadata() == {"format": "pt"}
    done = [float(count) for count, _ in told]
    total = sum(tensor.nbytes for tensor in expected.values()) / 1e6
    assert done == sorted(done) and len(set(done)) > 3 and told[-1][0] == told[-1][1] == f"{total:.1f}"


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_of_a_pickle_are_counted_as_they_are_read(tmp_path, counts, zipped) -> None:
    tensors = {str(number): torch.full((250_000,), float(number)) for number in range(4)}
    torch.save({"state": tensors}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_pickle(tmp_path / "a.ckpt")["state"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    told = counts()
    if zipped:
        assert told[-1] == ("4.0", "4.0") and {count for count, _ in told} >= {"1.0", "2.0", "3.0"}
