"""The attribute maps of GDPO-SR, against maps recorded from the released code (attribute_maps.*).

The released code swaps red and blue when it computes gray, so agreement is tested on channel-flipped images.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from _data import DATA
from _support import picked
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rewardsr.rewards.attribute import THRESHOLD, _gray_levels, complexity_map, texture_share

GOLDEN = json.loads((DATA / "attribute_maps.json").read_text())["images"]
VECTORS = load_file(DATA / "attribute_maps.safetensors")
PHOTOS = Path(skimage.__file__).parent / "data"


def pixels(name: str) -> np.ndarray:
    """(H, W, 3) uint8 RGB, made or read by the recipe, and checked against its hash."""
    recipe = GOLDEN[name]["recipe"]
    if "file" in recipe:
        x, y, size = recipe["x"], recipe["y"], recipe["size"]
        image = np.array(Image.open(PHOTOS / recipe["file"]).convert("RGB"))[y : y + size, x : x + size]
    elif name == "noise_128":
        image = np.array(Image.open(DATA / "reward_images" / "noise_128.png").convert("RGB"))
    elif name == "flat_128":
        image = np.full((128, 128, 3), (90, 140, 33), np.uint8)
    elif name == "gradient_128":
        y, x = np.mgrid[:128, :128]
        image = np.stack([2 * x, 2 * y, x + y], -1).astype(np.uint8)
    else:
        y, x = np.mgrid[:120, :120]
        image = np.repeat((255 * ((x + y) % 2)).astype(np.uint8)[..., None], 3, -1)
    if hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() != GOLDEN[name]["rgb_sha256"]:
        assert recipe.get("file", "").endswith(".jpg"), f"{name} is not the recorded image"
        pytest.skip("another JPEG decoder than the one that recorded the vectors")
    return image


def photo(name: str) -> Tensor:
    """(1, 3, H, W) RGB in [0, 1]."""
    return torch.from_numpy(pixels(name).copy()).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_maps_equal_the_released_codes(name: str) -> None:
    complexity = complexity_map(photo(name).flip(1))[0].double()
    ours, theirs = picked(complexity, VECTORS, f"{name}.complexity_blocks")
    assert (ours - theirs).abs().max() < 1e-3
    assert torch.equal(complexity > THRESHOLD, VECTORS[f"{name}.binary_blocks"].bool())


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_share_is_of_pixels(name: str) -> None:
    share = float(texture_share(photo(name).flip(1)))
    assert share == pytest.approx(GOLDEN[name]["detail_ratio"], abs=0.01)
    assert share == pytest.approx(1 - GOLDEN[name]["fidelity_exact"], abs=1e-6)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_share_of_true_rgb(name: str) -> None:
    fidelity, detail = GOLDEN[name]["with_correct_RGB2GRAY"]
    share = float(texture_share(photo(name)))
    assert share == pytest.approx(detail, abs=0.01)
    assert 1 - share == pytest.approx(fidelity, abs=0.01)


def test_channel_order_matters() -> None:
    image = photo("astronaut_512")
    assert abs(float(texture_share(image)) - float(texture_share(image.flip(1)))) > 0.01


@pytest.mark.parametrize("name", ["astronaut_512", "coffee_256"])
def test_gray_is_the_recorded_gray(name: str) -> None:
    gray = _gray_levels(photo(name).flip(1))[0].to(torch.uint8).numpy()
    assert hashlib.sha256(np.ascontiguousarray(gray).tobytes()).hexdigest() == GOLDEN[name]["gray_sha256"]


def test_one_cell_in_detail() -> None:
    gray = VECTORS["patch.input"].float()[None, None].expand(1, 3, 10, 10)
    assert float(complexity_map(gray)) == pytest.approx(float(VECTORS["patch.complexity"]), abs=0.1)


def test_rows_do_not_mix() -> None:
    images = torch.cat([photo("gradient_128"), photo("noise_128"), photo("flat_128")])
    together = complexity_map(images)
    assert together.shape == (3, 13, 13)
    for row, image in enumerate(images):
        assert torch.equal(together[row], complexity_map(image[None])[0])
    assert texture_share(images).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("size", "cells"), [((7, 23), (1, 3)), ((10, 10), (1, 1)), ((9, 4), (1, 1)), ((31, 20), (4, 2))]
)
def test_odd_sizes(size: tuple[int, int], cells: tuple[int, int]) -> None:
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert complexity_map(image).shape == (2, *cells)
    assert ((texture_share(image) >= 0) & (texture_share(image) <= 1)).all()


def test_remainders_count_by_their_area() -> None:
    # 40 full columns of flat cells, and on the right a strip of 5 pixels of noise: 5 of 45 columns are texture.
    image = torch.full((1, 3, 40, 45), 0.5)
    image[..., 40:] = torch.rand(1, 3, 40, 5, generator=torch.Generator().manual_seed(0))
    assert float(texture_share(image)) == pytest.approx(5 / 45)


def test_half_precision_autocast_changes_nothing() -> None:
    image = photo("coffee_256")
    expected = complexity_map(image)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(complexity_map(image), expected)


def test_float_images_are_taken_as_8_bit() -> None:
    image = photo("coffee_256")
    noise = torch.empty_like(image).uniform_(-0.4 / 255, 0.4 / 255, generator=torch.Generator().manual_seed(0))
    assert torch.equal(complexity_map(image + noise), complexity_map(image))


def test_no_gradient_and_float32() -> None:
    share = texture_share(torch.rand(2, 3, 20, 20, requires_grad=True))
    assert share.shape == (2,)
    assert share.dtype == torch.float32
    assert not share.requires_grad


def test_refuses_gray_images() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\), got \(2, 1, 20, 20\)"):
        texture_share(torch.rand(2, 1, 20, 20))
