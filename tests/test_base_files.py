"""Files of a base as people have them: in shards, in half precision only; damaged tokenizers and configurations."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rewardsr import UserError, load_adapter

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
WIDE, OPTIONS = "diffusion_pytorch_model", {"steps": 2}


@pytest.fixture
def base(tiny_base, tmp_path) -> Path:
    """A copy of the tiny pipeline that a test may spoil."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def variant(folder: Path, stem: str, name: str = "fp16") -> None:
    (folder / f"{stem}.safetensors").rename(folder / f"{stem}.{name}.safetensors")


def shards(folder: Path, stem: str, name: str | None = None) -> None:
    """As `save_pretrained(max_shard_size=...)` writes them."""
    whole = folder / f"{stem}.safetensors"
    tensors, end = load_file(whole), "" if name is None else f".{name}"
    whole.unlink()
    places = {key: f"{stem}{end}-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({key: tensors[key] for key in places if places[key] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.safetensors.index{end}.json").write_text(json.dumps(index))


def same(one, other) -> None:
    assert one.base_model.fingerprint == other.base_model.fingerprint


LAYOUTS = {
    "a variant": variant,
    "another variant": lambda folder, stem: variant(folder, stem, "non_ema"),
    "shards": shards,
    "shards of a variant": lambda folder, stem: shards(folder, stem, "fp16"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", STEMS)
def test_parts_of_a_base(layout, part, base, tiny_base) -> None:
    LAYOUTS[layout](base / part, STEMS[part])
    same(load_adapter("osediff", base), load_adapter("osediff", tiny_base))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("part", ["unet", "controlnet"])
def test_seesr_networks(layout, part, tiny_seesr, tmp_path) -> None:
    weights = tmp_path / "seesr"
    for name in ("unet", "controlnet"):
        (weights / name).mkdir(parents=True)
        shutil.copy(Path(tiny_seesr) / name / "config.json", weights / name)
        shutil.copy(Path(tiny_seesr) / name / f"{WIDE}.safetensors", weights / name)
    LAYOUTS[layout](weights / part, WIDE)
    same(
        load_adapter("seesr", tiny_seesr, weights=str(weights), **OPTIONS), load_adapter("seesr", tiny_seesr, **OPTIONS)
    )


def test_merged_weights_in_shards(base, tiny_base, tmp_path) -> None:
    for name in ("unet", "vae"):
        shutil.copytree(base / name, tmp_path / "weights" / name)
        shards(tmp_path / "weights" / name, WIDE)
    same(load_adapter("osediff", base, weights=str(tmp_path / "weights")), load_adapter("osediff", tiny_base))


def refusal(base, name: str = "osediff", **options) -> str:
    with pytest.raises(UserError) as caught:
        load_adapter(name, base, **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
    return str(caught.value)


@pytest.mark.parametrize("part", STEMS)
def test_several_variants_are_named(part, base) -> None:
    stem = STEMS[part]
    shutil.copy(base / part / f"{stem}.safetensors", base / part / f"{stem}.ema.safetensors")
    load_adapter("osediff", base)  # plain weights are there as well
    variant(base / part, stem)
    assert "keep one of ema, fp16" in refusal(base)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("[]", "damaged"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ("{}", "weight_map"),
        ('{"weight_map": [1]}', "weight_map"),
        ('{"weight_map": {"conv_in.weight": 3}}', "weight_map"),
        ('{"weight_map": {"conv_in.weight": "../unet/x.safetensors"}}', "weight_map"),
        ('{"weight_map": {"conv_in.weight": "/etc/hostname"}}', "weight_map"),
        ('{"weight_map": {"conv_in.weight": "x.safetensors"}}', "x.safetensors"),
        ('{"weight_map": {}}', "controlnet"),
    ],
)
def test_an_index_of_shards_that_is_damaged(index, says, tiny_seesr, tmp_path) -> None:
    copy = Path(shutil.copytree(tiny_seesr, tmp_path / "seesr"))
    shards(copy / "controlnet", WIDE)
    (copy / "controlnet" / f"{WIDE}.safetensors.index.json").write_text(index)
    said = refusal(copy, "seesr", **OPTIONS)
    assert "controlnet" in said and says in said


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_shard_that_is_missing(part, base) -> None:
    shards(base / part, STEMS[part])
    next((base / part).glob("*-00002-of-00002.safetensors")).unlink()
    assert part in refusal(base)


# ---- tokenizers ----


def spoil(folder: Path, vocabulary=None, merges=None, **config) -> None:
    (folder / "tokenizer.json").unlink(missing_ok=True)
    if vocabulary is not None:
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
    if merges is not None:
        (folder / "merges.txt").write_text(merges)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_an_empty_tokenizer(base) -> None:
    shutil.rmtree(base / "tokenizer")
    (base / "tokenizer").mkdir()
    assert "the tokenizer has 2 tokens, but the text encoder expects 514" in refusal(base)
    (base / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    assert "tokens, but the text encoder expects 514" in refusal(base)


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("left", [None, "", "{", "[]", "\x00\xff"])
def test_a_tokenizer_that_lacks_a_file(file, left, base) -> None:
    spoil(base / "tokenizer")
    if left is None:
        (base / "tokenizer" / file).unlink()
    elif file == "merges.txt":
        return  # this tokenizer has no merges
    else:
        (base / "tokenizer" / file).write_text(left, encoding="latin-1")
    assert "tokenizer" in refusal(base)


def test_a_vocabulary_that_is_not_the_text_encoders(base) -> None:
    path = base / "tokenizer" / "vocab.json"
    whole = json.loads(path.read_text())
    for vocabulary in (
        {token: index for token, index in whole.items() if index not in range(100, 110)},
        whole | {"new": 514},
        whole | {"a</w>": 5000},
    ):
        spoil(base / "tokenizer", vocabulary)
        assert "tokens, but the text encoder expects 514" in refusal(base)


def test_merges_that_are_missing(base) -> None:
    """The words are in the vocabulary, and would be spelled all the same."""
    words = ["cat</w>", "photo</w>", "of</w>"]
    path, config = base / "tokenizer" / "vocab.json", base / "text_encoder" / "config.json"
    vocabulary = json.loads(path.read_text())
    spoil(
        base / "tokenizer", {**vocabulary, **{word: 514 + index for index, word in enumerate(words)}}, "#version: 0.2\n"
    )
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 517}))
    weights = base / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    (name,) = (key for key in tensors if key.endswith("token_embedding.weight"))
    save_file(tensors | {name: torch.cat([tensors[name], tensors[name][:3]])}, weights, {"format": "pt"})
    assert "which it has a token for: its merges are missing" in refusal(base)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, "is of 'T5Tokenizer', expected CLIPTokenizer"),
        ({"tokenizer_class": ["x"]}, "expected CLIPTokenizer"),
        ({"tokenizer_class": "CLIPTokenizer", "model_max_length": "x"}, "model_max_length of the tokenizer is 'x'"),
        ({"tokenizer_class": "CLIPTokenizer", "model_max_length": 0}, "model_max_length"),
    ],
)
def test_a_tokenizer_of_another_class(config, says, base) -> None:
    spoil(base / "tokenizer", **config)
    assert says in refusal(base)


# ---- configurations ----

ODD = ["[]", "3", "null", '"x"', "{", "", "[" * 100_000, "\x00"]


@pytest.mark.parametrize("text", ODD, ids=lambda text: text[:5])
@pytest.mark.parametrize(
    "file",
    [*(f"{part}/config.json" for part in STEMS), "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"],
)
def test_a_configuration_that_is_no_object(file, text, base) -> None:
    (base / file).write_text(text)
    assert file.partition("/")[0] in refusal(base)


@pytest.mark.parametrize(
    "values",
    [
        *({"num_train_timesteps": value} for value in ("x", None, 0, -5, 2.5, True, 10**9, [1000])),
        *({"beta_start": value} for value in ("x", None, -0.1, 0, 1.5, [0.1])),
        *({"beta_end": value} for value in (-0.012, 1.0, 7, {})),
        {"beta_start": 0.0, "beta_end": 0.0},
        {"beta_schedule": ["linear"]},
        {"beta_schedule": None},
        {"prediction_type": ["epsilon"]},
        {"prediction_type": {}},
        {"timestep_spacing": "sideways"},
        {"steps_offset": "x"},
        {"trained_betas": [0.1]},
    ],
    ids=str,
)
def test_a_schedule_of_odd_values(values, base) -> None:
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert "scheduler" in refusal(base)


@pytest.mark.parametrize("value", [None, 0, 0.0, -1, "x", True, [0.18215], {}])
def test_a_scaling_factor_that_is_none(value, base) -> None:
    path = base / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": value}))
    assert "scaling_factor" in refusal(base)


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("unet", {"_class_name": None}),
        ("unet", {"_class_name": ["UNet2DConditionModel"]}),
        ("unet", {"block_out_channels": "x"}),
        ("unet", {"block_out_channels": []}),
        ("unet", {"cross_attention_dim": None}),
        ("unet", {"attention_head_dim": 0}),
        ("unet", {"in_channels": -1}),
        ("vae", {"latent_channels": "4"}),
        ("vae", {"block_out_channels": None}),
        ("text_encoder", {"hidden_size": "wide"}),
        ("text_encoder", {"vocab_size": None}),
        ("text_encoder", {"max_position_embeddings": None}),
        ("text_encoder", {"num_attention_heads": 0}),
    ],
    ids=str,
)
def test_a_network_of_odd_values(part, values, base) -> None:
    path = base / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    assert part in refusal(base) or "UNet" in refusal(base)
