"""Whatever a LoRA file holds: it loads, or one line says why not and the pipeline is untouched."""

import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from rewardsr import UserError, load_adapter, lora, run_folder
from rewardsr.lora import exchange

NAMES = {
    "ours": run_folder.LORA,
    "diffusers": "diffusers.safetensors",
    "kohya": "kohya.safetensors",
    "pickle": "family.pkl",
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "bias", "new")
PEFT += ("exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "peft_type", "fan_in_fan_out")


@pytest.fixture(scope="module")
def adapter(tiny_base):
    return load_adapter("osediff", tiny_base, noise_t=250)


@pytest.fixture(scope="module")
def state(adapter) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in adapter.unet.state_dict().items()}


@pytest.fixture(scope="module")
def files(adapter, state, tmp_path_factory) -> dict[str, Path]:
    """A small valid LoRA in every form."""
    folder = tmp_path_factory.mktemp("files")
    targets, kept = adapter.lora_targets, {}
    adapter.lora_targets = {"unet": ("to_q", "conv_in")}
    lora.attach(adapter, 2, 3)
    for value in lora.parameters(adapter).values():
        value.data = 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
    kept["ours"] = lora.save(adapter, folder / "run")
    for form in ("diffusers", "kohya", "peft"):
        exchange.export(adapter, folder / form, form)
        found = folder / "peft" / "unet" if form == "peft" else next((folder / form).glob("*.safetensors"))
        kept[form] = found
    tensors = {
        key.removeprefix("unet.").replace(".weight", ".default_encoder.weight"): value
        for key, value in load_file(kept["ours"]).items()
    }
    kept["pickle"] = folder / "family.pkl"
    torch.save({"rank_unet": 2, "state_dict_unet": tensors}, kept["pickle"])
    lora.detach(adapter)
    adapter.lora_targets = targets
    return kept


@pytest.fixture(scope="module")
def attempt(adapter, state, files, tmp_path_factory):
    """Loads files, given as their contents by name, in every way that takes them."""
    folder = tmp_path_factory.mktemp("attempts")

    def check(form: str, contents: dict[str, bytes]) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        source = folder if form == "peft" else folder / next(iter(contents))
        ways = [lambda: exchange.import_lora(adapter, source)]
        if form in ("ours", "pickle"):
            ways = [lambda: lora.load(adapter, source), *ways]
        for way in ways:
            try:
                way()
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
                assert not lora.names(adapter)
            else:
                assert all(value.isfinite().all() for value in lora.parameters(adapter).values())
                lora.detach(adapter)
            after = adapter.unet.state_dict()
            assert after.keys() == state.keys() and all(torch.equal(v, after[k]) for k, v in state.items())

    return check


def header_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


ATOMS = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
DTYPES = st.sampled_from(
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float64,
        torch.int64,
        torch.bool,
        torch.uint8,
    ]
)
SHAPES = st.lists(st.integers(0, 5), max_size=5).map(tuple)
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    SHAPES,
    DTYPES,
    st.sampled_from([0.0, 1.0, -3.5, 1e38, float("nan"), float("inf")]),
)
ENDS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_up.weight",
    "lora.down.weight",
    "alpha",
    "dora_scale",
    "lokr_w1",
    "diff",
)
STEMS = (
    "unet.conv_in",
    "lora_unet_conv_in",
    "conv_in",
    "diffusion_model.input_blocks.0.0",
    "text_encoder.x",
    "",
    "vae.x",
)
KEYS = st.builds(lambda stem, end: f"{stem}.{end}", st.sampled_from(STEMS), st.sampled_from(ENDS)) | st.text(max_size=9)


@given(data=st.data())
@settings(max_examples=60)
def test_damaged_bytes(data, files, attempt) -> None:
    form = data.draw(st.sampled_from(sorted(NAMES)))
    content = bytearray(files[form].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Most of what can go wrong is in the first bytes: lengths, names, opcodes.
        place = data.draw(st.integers(0, min(len(content), 3000)) | st.integers(0, len(content)))
        piece = data.draw(st.binary(max_size=9))
        kind = data.draw(st.sampled_from(["replace", "insert", "cut"]))
        if kind == "cut":
            del content[place : place + data.draw(st.integers(1, 40) | st.just(len(content)))]
        else:
            content[place : place + (len(piece) if kind == "replace" else 0)] = piece
    attempt(form, {NAMES[form]: bytes(content)})


@given(data=st.data())
@settings(max_examples=60)
def test_odd_headers(data, files, attempt) -> None:
    form = data.draw(st.sampled_from(["ours", "diffusers"]))
    header = header_of(files[form])
    for name in (run_folder.OUR_HEADER, run_folder.DIFFUSERS_HEADER):
        content = json.loads(header[name])
        keys = st.sampled_from([*content, *(f"unet.{key}" for key in PEFT)]) | st.text(max_size=9)
        changes = data.draw(st.dictionaries(keys, JSON, max_size=2))
        header[name] = json.dumps(data.draw(st.sampled_from([content | changes] * 5 + [changes, *changes.values()])))
    attempt(form, {NAMES[form]: save(load_file(files[form]), header)})


@given(data=st.data())
@settings(max_examples=60)
def test_odd_tensors(data, files, attempt) -> None:
    form = data.draw(st.sampled_from(["ours", "diffusers", "kohya", "peft"]))
    path = files[form] / WEIGHTS if form == "peft" else files[form]
    tensors = load_file(path)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        if data.draw(st.booleans()):
            del tensors[key]
        else:
            tensors[key] = data.draw(TENSORS | st.just(tensors[key]) | DTYPES.map(lambda d, t=tensors[key]: t.to(d)))
    tensors |= data.draw(st.dictionaries(KEYS, TENSORS, max_size=2))
    kept = {key: value for key, value in tensors.items() if key != "__metadata__"}
    content = save(kept, header_of(path))
    config = {CONFIG: (files["peft"] / CONFIG).read_bytes()} if form == "peft" else {}
    attempt(form, {NAMES.get(form, WEIGHTS): content} | config)


@given(data=st.data())
@settings(max_examples=60)
def test_odd_settings_of_peft(data, files, attempt) -> None:
    config = json.loads((files["peft"] / CONFIG).read_text())
    changes = data.draw(st.dictionaries(st.sampled_from([*PEFT, *config]) | st.text(max_size=9), JSON, max_size=3))
    text = json.dumps(data.draw(st.sampled_from([config | changes] * 6 + [changes, [config], *changes.values()])))
    attempt("peft", {CONFIG: text.encode(), WEIGHTS: (files["peft"] / WEIGHTS).read_bytes()})


@given(data=st.data())
@settings(max_examples=60)
def test_odd_releases(data, files, attempt) -> None:
    release = torch.load(files["pickle"], weights_only=True)
    state = release["state_dict_unet"]
    names = st.sampled_from(
        [*state, *(key.replace("_encoder", "_other") for key in state), "conv_in.base_layer.weight"]
    )
    odd = st.none() | st.integers(-3, 3) | st.text(max_size=5)
    state |= data.draw(st.dictionaries(names | odd, TENSORS | odd | st.sampled_from(list(state.values())), max_size=3))
    places = st.sampled_from(["rank_unet", "rank_unet_pix", "state_dict_unet", "state_dict_vae", "state_dict_x"]) | odd
    release |= data.draw(
        st.dictionaries(places, odd | TENSORS | st.just(state) | st.lists(odd, max_size=2), max_size=2)
    )
    content = io.BytesIO()
    torch.save(data.draw(st.sampled_from([release] * 6 + [state, [release], None])), content)
    attempt("pickle", {NAMES["pickle"]: content.getvalue()})
