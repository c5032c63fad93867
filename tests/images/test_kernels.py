"""Blur kernels of the Real-ESRGAN degradation against the original implementation, and the blur against convolution."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from _data import DATA
from safetensors.torch import load_file

from rewardsr.data.degrade.kernels import Hill, Sinc, filtered

VECTORS = load_file(DATA / "degradation_kernels.safetensors")
PARAMETERS = json.loads((DATA / "degradation_kernels.json").read_text())["kernels"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_kernels_are_those_of_the_original(name) -> None:
    own = PARAMETERS[name]
    if own["kind"] == "sinc":
        kernel = Sinc(own["size"], own["cutoff"]).tensor()
    else:
        round_ = own["sigma_y"] is None
        # What does not count for a kind must have no effect on it.
        sigma = (own["sigma_x"], 9.0 if round_ else own["sigma_y"])
        beta = 7.0 if own["beta"] is None else own["beta"]
        rotation = 1.0 if own["theta"] is None else own["theta"]
        kernel = Hill(own["kind"], own["size"], sigma, rotation, beta).tensor()
    assert kernel.dtype == torch.float64
    assert torch.allclose(kernel, VECTORS[name], rtol=0, atol=1e-6)
    assert abs(float(kernel.sum()) - 1) < 1e-12


def test_all_kinds_are_compared() -> None:
    assert set(VECTORS) == set(PARAMETERS)
    assert len({own["kind"] for own in PARAMETERS.values()}) == 7


def test_a_sinc_filter_keeps_what_is_slow_and_takes_out_what_is_fast() -> None:
    """Its response along an axis: whole at rest, half at the cutoff, none well above."""
    for cutoff in (math.pi / 3, math.pi / 2):
        line = Sinc(21, cutoff).tensor().sum(0)
        at = torch.arange(21, dtype=torch.float64) - 10
        response = [float((line * torch.cos(at * share * cutoff)).sum()) for share in (0.0, 0.5, 1.0, 1.4)]
        assert response[0] == pytest.approx(1) and response[1] == pytest.approx(1, abs=0.1)
        assert response[2] == pytest.approx(0.5, abs=0.05) and response[3] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("size", [(64, 64), (57, 83), (11, 12), (5, 40), (1, 1)])
def test_each_image_is_correlated_with_its_own_kernel(size) -> None:
    """Of unlike sizes and without symmetry; 5 and 1 pixels are too few to be mirrored, and are repeated."""
    images = torch.rand((4, 3, *size), generator=torch.Generator().manual_seed(0))
    kernels = [
        Hill("aniso", 7, (0.5, 2.0), 0.4, 1.0),
        Sinc(13, 1.3),
        None,
        Hill("plateau_aniso", 21, (4.0, 1.0), 2.0, 1.0),
    ]
    found = filtered(images, kernels, 21)
    padded = F.pad(images, (10,) * 4, mode="reflect" if min(size) > 10 else "replicate").double()
    for place, kernel in enumerate(kernels):
        if kernel is None:
            assert torch.equal(found[place], images[place])
            continue
        margin = 10 - kernel.size // 2
        inner = padded[place, :, margin : size[0] + 20 - margin, margin : size[1] + 20 - margin]
        expected = F.conv2d(inner[:, None], kernel.tensor()[None, None])[:, 0]
        assert found.shape == images.shape
        assert (found[place] - expected).abs().max() < 3e-6


def test_an_image_is_filtered_alike_whatever_the_others() -> None:
    images = torch.rand((3, 3, 50, 70), generator=torch.Generator().manual_seed(0))
    kernels = [Sinc(21, 1.5), None, Hill("iso", 7, (1.0, 1.0), 0.0, 1.0)]
    together = filtered(images, kernels, 21)
    for place, kernel in enumerate(kernels):
        assert torch.allclose(filtered(images[place : place + 1], [kernel], 21)[0], together[place], rtol=0, atol=1e-6)
