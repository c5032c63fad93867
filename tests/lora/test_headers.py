"""LoRA files of ours whose header or tensors were tampered with: one line, and the pipeline is as it was."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewardsr import UserError, load_adapter, lora
from rewardsr.run_folder import DIFFUSERS_HEADER, OUR_HEADER

FIRST = "unet.conv_in.lora_A.weight"


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory) -> Path:
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    lora.attach(adapter, 2, 3)
    return lora.save(adapter, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def refused(tiny_base, saved, tmp_path):
    """Loads a copy of the file, changed, in every way that there is; what is said of it."""

    def check(tensors=None, ours=None, theirs=None, **raw: str) -> str:
        with safe_open(saved, "pt") as file:
            header = file.metadata()
        for name, changes in ((OUR_HEADER, ours), (DIFFUSERS_HEADER, theirs)):
            content = {**json.loads(header[name]), **(changes or {})}
            header[name] = json.dumps({key: value for key, value in content.items() if value is not ...})
        content = {key: value for key, value in (load_file(saved) | (tensors or {})).items() if value is not None}
        path = tmp_path / "changed.safetensors"
        save_file(content, path, header | raw)
        adapter = load_adapter("osediff", tiny_base, noise_t=250)
        before = {name: value.clone() for name, value in adapter.unet.state_dict().items()}
        said = []
        for load in (lambda: lora.load(adapter, path), lambda: lora.load_several(adapter, [(saved, 1), (path, 1)])):
            with pytest.raises(UserError) as caught:
                load()
            said.append(str(caught.value))
        after = adapter.unet.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
        assert said[0] == said[1] and "\n" not in said[0] and len(said[0]) < 500
        return said[0]

    return check


TEXTS = ["[]", "null", "3", '"text"', "{", "", "[" * 100_000, '{"a":' * 5000, '{"rank": Infinity}', '{"rank": NaN}']


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
@pytest.mark.parametrize("name", [OUR_HEADER, DIFFUSERS_HEADER])
def test_a_header_that_is_no_object(name, text, refused) -> None:
    assert "has a damaged header" in refused(**{name: text})


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        ({"rank": None}, "rank is None"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": -1}, "rank is -1"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": "2"}, "rank is '2'"),
        ({"rank": True}, "rank is True"),
        ({"rank": 1e8}, "expected at most 4096"),
        ({"rank": 10**400}, "expected"),
        ({"rank": ...}, "rank"),
        ({"rank": 3, "alpha": 3}, "r is 2"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": -2}, "alpha is -2"),
        ({"alpha": 1e300}, "alpha is 1e+300"),
        ({"alpha": [3, 3]}, "alpha is [3, 3]"),
        ({"alpha": "much"}, "alpha is 'much'"),
        ({"alpha": 4}, "lora_alpha is 3"),
        ({"base": None}, "damaged header"),
        ({"base": []}, "damaged header"),
        ({"base": "x"}, "damaged header"),
        ({"base": {"id": "x", "revision": "y"}}, "damaged header"),
        ({"base": {"id": "x", "revision": "y", "fingerprint": 3}}, "damaged header"),
        ({"base": {"id": "x", "revision": "y", "fingerprint": "z", "more": 1}}, "damaged header"),
        *(
            ({"base": {"id": "x", "revision": "y", "fingerprint": fingerprint}}, "--force-base overrides")
            for fingerprint in ("", ":", "x", "a:1,2", "a:nan", "a:b", "=", "unet=", "unet=a:!!!", "\x00", "é" * 50)
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_our_header(ours, says, refused) -> None:
    assert says in refused(ours=ours)


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"unet.target_modules": None}, "target_modules is None"),
        ({"unet.target_modules": []}, "target_modules is []"),
        ({"unet.target_modules": "all-linear"}, "target_modules is 'all-linear'"),
        ({"unet.target_modules": [None]}, "target_modules is [None]"),
        ({"unet.target_modules": ["nowhere"]}, "fit no module: nowhere"),
        ({"unet.target_modules": ["conv_norm_out"]}, "is GroupNorm"),
        ({"vae.target_modules": ["conv_in"]}, "missing"),
        ({"nothing.target_modules": ["conv_in"]}, "'nothing', no network here"),
        ({"target_modules": ["conv_in"]}, "of no component"),
        ({"unet.use_rslora": True}, "use_rslora is True"),
        ({"unet.use_dora": True}, "use_dora is True"),
        ({"unet.alpha_pattern": {"conv_in": 1}}, "alpha_pattern"),
        ({"unet.init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"unet.r": 3}, "r is 3"),
        ({"unet.lora_alpha": "3"}, "lora_alpha is '3'"),
    ],
    ids=str,
)
def test_the_header_for_diffusers(theirs, says, refused) -> None:
    assert says in refused(theirs=theirs)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({FIRST: torch.ones(3, 4, 3, 3)}, "conv_in.lora_A.weight is (3, 4, 3, 3), expected (2, 4, 3, 3)"),
        ({FIRST: torch.ones(2, 4, 3, 3, dtype=torch.int32)}, "is of int32"),
        ({FIRST: torch.ones(2, 4, 3, 3, dtype=torch.bool)}, "is of bool"),
        ({FIRST: torch.full((2, 4, 3, 3), torch.nan, dtype=torch.float8_e4m3fn)}, "not finite"),
        ({FIRST: torch.ones(0)}, "is (0,)"),
        ({FIRST: None}, "1 missing"),
        ({"unet.conv_in.alpha": torch.ones(1)}, "1 unexpected (first: unet.conv_in.alpha)"),
        ({"x": torch.ones(1)}, "unexpected"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_tensors(tensors, says, refused) -> None:
    assert says in refused(tensors)


def test_half_precision_is_none_of_it(saved, tiny_base, tmp_path) -> None:
    with safe_open(saved, "pt") as file:
        header = file.metadata()
    halves = {key: value.half() for key, value in load_file(saved).items()}
    save_file(halves, tmp_path / "half.safetensors", header)
    adapter = load_adapter("osediff", tiny_base, noise_t=250)
    lora.load(adapter, tmp_path / "half.safetensors")
    assert all(torch.equal(value, halves[key].float()) for key, value in lora.state_dict(adapter).items())
