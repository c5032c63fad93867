"""Blur kernels of the Real-ESRGAN degradation against the original implementation, and the blur against convolution."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from _data import DATA
from safetensors.torch import load_file

from rewardsr.data.degrade.kernels import blur, blur_kernel, centred, sinc_kernel

VECTORS = load_file(DATA / "degradation_kernels.safetensors")
PARAMETERS = json.loads((DATA / "degradation_kernels.json").read_text())["kernels"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_kernels_are_those_of_the_original(name) -> None:
    own = PARAMETERS[name]
    if own["kind"] == "sinc":
        kernel = sinc_kernel(own["size"], own["cutoff"])
    else:
        round_ = own["sigma_y"] is None
        # What does not count for a kind must have no effect on it.
        sigma = (own["sigma_x"], 9.0 if round_ else own["sigma_y"])
        beta = 7.0 if own["beta"] is None else own["beta"]
        kernel = blur_kernel(own["kind"], own["size"], sigma, 1.0 if own["theta"] is None else own["theta"], beta)
    assert kernel.dtype == torch.float64
    assert torch.allclose(kernel, VECTORS[name], rtol=0, atol=1e-6)
    assert abs(float(kernel.sum()) - 1) < 1e-12


def test_all_kinds_are_compared() -> None:
    assert set(VECTORS) == set(PARAMETERS)
    assert len({own["kind"] for own in PARAMETERS.values()}) == 7


def test_a_sinc_filter_keeps_what_is_slow_and_takes_out_what_is_fast() -> None:
    """Its response along an axis: whole at rest, half at the cutoff, none well above."""
    for cutoff in (math.pi / 3, math.pi / 2):
        line = sinc_kernel(21, cutoff).sum(0)
        at = torch.arange(21, dtype=torch.float64) - 10
        response = [float((line * torch.cos(at * share * cutoff)).sum()) for share in (0.0, 0.5, 1.0, 1.4)]
        assert response[0] == pytest.approx(1) and response[1] == pytest.approx(1, abs=0.1)
        assert response[2] == pytest.approx(0.5, abs=0.05) and response[3] == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("size", [(64, 64), (57, 83), (11, 12), (5, 40), (1, 1)])
def test_the_blur_is_a_correlation_with_mirrored_borders(size) -> None:
    """Of kernels without symmetry; 5 and 1 pixels are too few to be mirrored, and are repeated."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand((3, 3, *size), generator=random)
    kernels = [torch.rand((side, side), generator=random, dtype=torch.float64) for side in (7, 13, 21)]
    kernels = [kernel / kernel.sum() for kernel in kernels]
    blurred = blur(images, torch.stack([centred(kernel, 21) for kernel in kernels]))
    padded = F.pad(images, (10,) * 4, mode="reflect" if min(size) > 10 else "replicate")
    for image, kernel, own in zip(padded, kernels, blurred, strict=True):
        margin = 10 - len(kernel) // 2
        inner = image[:, margin : image.shape[1] - margin, margin : image.shape[2] - margin]
        expected = F.conv2d(inner[:, None].double(), kernel[None, None])[:, 0]
        assert own.shape == (3, *size)
        assert (own - expected).abs().max() < 3e-6
