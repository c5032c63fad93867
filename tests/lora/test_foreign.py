"""LoRAs of other programs do here what they do there, weight by weight; what cannot be is refused by its name."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from rewardsr import UserError, load_adapter, lora, run_folder
from rewardsr.lora import exchange
from rewardsr.lora.original import original_names

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "downsamplers.0.conv", "upsamplers.0.conv"]
TOLERANCE = 1e-6


@pytest.fixture
def adapter(tiny_base):
    return load_adapter("osediff", tiny_base, noise_t=250)


def plain(base) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(Path(base) / "unet")


def shake(network, seed: int = 0) -> None:
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=random))


def changes(after, base) -> dict[str, torch.Tensor]:
    before = plain(base).state_dict()
    return {name: value - before[name] for name, value in after.items() if not torch.equal(value, before[name])}


def imported(adapter, source, base) -> dict[str, torch.Tensor]:
    """What an import changes in the UNet's weights."""
    exchange.import_lora(adapter, source)
    lora.merge(adapter)
    return changes(adapter.unet.state_dict(), base)


def alike(ours, theirs) -> None:
    assert theirs and ours.keys() == theirs.keys()
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= TOLERANCE


def peft_folder(base, folder: Path, **settings) -> Path:
    """A LoRA as peft saves it."""
    model = get_peft_model(plain(base), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | settings))
    shake(model)
    model.save_pretrained(folder)
    return folder


def setting(folder: Path, **values) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


# ---- what is applied ----


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2, "conv1": 7}},
        {"alpha_pattern": {"to_q": 1, "mid_block.resnets.0.conv1": 9.5}},
        {"rank_pattern": {"to_v": 1}, "alpha_pattern": {"^down_blocks.*to_[kv]": 3}, "use_rslora": True},
        {"layers_to_transform": [0], "layers_pattern": "down_blocks"},
        {"target_modules": r".*\.(to_q|conv1)"},
        {"init_lora_weights": "orthogonal", "target_modules": ["to_q", "ff.net.2"]},
        {"exclude_modules": ["to_k", "mid_block.resnets.0.conv2"]},
    ],
    ids=str,
)
def test_settings_of_peft_do_what_they_do_there(settings, adapter, tiny_base, tmp_path) -> None:
    folder = peft_folder(tiny_base, tmp_path / "peft", **settings)
    theirs = PeftModel.from_pretrained(plain(tiny_base), str(folder)).merge_and_unload()
    alike(imported(adapter, folder, tiny_base), changes(theirs.state_dict(), tiny_base))


def test_the_weights_of_a_peft_folder_bring_its_settings(adapter, tiny_base, tmp_path) -> None:
    folder = peft_folder(tiny_base, tmp_path / "peft", use_rslora=True)
    theirs = PeftModel.from_pretrained(plain(tiny_base), str(folder)).merge_and_unload()
    alike(imported(adapter, folder / "adapter_model.safetensors", tiny_base), changes(theirs.state_dict(), tiny_base))


def test_settings_in_a_header_of_diffusers_count_as_well(adapter, tiny_base, tmp_path) -> None:
    network = plain(tiny_base)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=True, rank_pattern={"to_q": 2}, alpha_pattern={"conv1": 3}
    )
    network.add_adapter(config, "default")
    shake(network)
    network.save_lora_adapter(tmp_path)
    other = plain(tiny_base)
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    other.fuse_lora()
    other.unload_lora()
    alike(imported(adapter, tmp_path / run_folder.LORA, tiny_base), changes(other.state_dict(), tiny_base))


def one_of_each(network) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices of another rank for each module that a LoRA may sit on."""
    random, made = torch.Generator().manual_seed(0), {}
    for index, (name, module) in enumerate(network.named_modules()):
        if name.endswith(tuple(f".{target}" for target in TARGETS)):
            out, kernel, rank = module.weight.shape[0], module.weight.shape[1:], 1 + index % 3
            up = (out, rank, 1, 1) if len(kernel) == 3 else (out, rank)
            made[name] = tuple(0.1 * torch.randn(shape, generator=random) for shape in ((rank, *kernel), up))
    return made


SPELLINGS = {
    "diffusers' training scripts": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "peft in diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft by name": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
    "peft of a component": ("unet.base_model.model.{}.lora_A.weight", "unet.base_model.model.{}.lora_B.weight"),
    "ComfyUI": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight"),
    "ComfyUI, down and up": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
    "bare": ("{}.lora_A.weight", "{}.lora_B.weight"),
    "kohya": ("lora_unet_{_}.lora_down.weight", "lora_unet_{_}.lora_up.weight"),
    "original": ("diffusion_model.{o}.lora_A.weight", "diffusion_model.{o}.lora_B.weight"),
    "original checkpoint": ("model.diffusion_model.{o}.lora_down.weight", "model.diffusion_model.{o}.lora_up.weight"),
    "original in kohya": ("lora_unet_{o_}.lora_down.weight", "lora_unet_{o_}.lora_up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_every_way_of_naming_the_modules(spelling, alpha, adapter, tiny_base, tmp_path) -> None:
    network = plain(tiny_base)
    original = original_names(network)
    tensors, expected = {}, {}
    for module, pair in one_of_each(network).items():
        for key, tensor in zip(SPELLINGS[spelling], pair, strict=True):
            old = original(module)
            names = {"_": module.replace(".", "_"), "o": old, "o_": old.replace(".", "_")}
            name = key.format(module, **names)
            tensors[name] = tensor
        if alpha is not None:
            stem = re.split(r"\.lora", name)[0]
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        rank = len(pair[0])
        expected[f"{module}.weight"] = lora.delta(*pair, (rank if alpha is None else alpha) / rank)
    save_file(tensors, tmp_path / "a.safetensors")
    alike(imported(adapter, tmp_path / "a.safetensors", tiny_base), expected)


def test_original_names_are_those_of_diffusers_own_converter() -> None:
    """A checkpoint in original names, filled with numbers, ends up where `original_names` says."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    config = {"block_out_channels": (8, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "cross_attention_dim": 8}
    kinds = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    network = UNet2DConditionModel(
        **config, down_block_types=kinds, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
    )
    original = original_names(network)
    modules = [
        name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]
    ldm = {f"model.diffusion_model.{original(name)}.weight": torch.tensor(i) for i, name in enumerate(modules)}
    assert len(ldm) == len(modules)
    for name in ("time_embed.0", "time_embed.2", "out.0", "out.2", "input_blocks.0.0"):
        ldm.setdefault(f"model.diffusion_model.{name}.weight", torch.tensor(0))
    ldm |= {key.replace(".weight", ".bias"): value for key, value in ldm.items()}
    converted = convert_ldm_unet_checkpoint(ldm, dict(network.config))
    assert [int(converted[f"{name}.weight"]) for name in modules] == list(range(len(modules)))


def test_attention_processors_of_old(adapter, tiny_base, tmp_path) -> None:
    tensors, expected = {}, {}
    for module, (down, up) in one_of_each(plain(tiny_base)).items():
        attention, _, layer = module.replace("to_out.0", "to_out").rpartition(".")
        if ".attn" in module:
            stem = f"unet.{attention}.processor.{layer}_lora"
            tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
            expected[f"{module}.weight"] = lora.delta(down, up, 1.0)
    save_file(tensors, tmp_path / "old.safetensors")
    alike(imported(adapter, tmp_path / "old.safetensors", tiny_base), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_precisions_are_taken_as_they_are(dtype, adapter, tiny_base, tmp_path) -> None:
    pairs = {name: tuple(value.to(dtype) for value in pair) for name, pair in one_of_each(plain(tiny_base)).items()}
    save_file(
        {f"unet.{n}.lora_{m}.weight": v for n, pair in pairs.items() for m, v in zip("AB", pair, strict=True)},
        tmp_path / "a.safetensors",
    )
    expected = {f"{name}.weight": lora.delta(a.float(), b.float(), 1.0) for name, (a, b) in pairs.items()}
    alike(imported(adapter, tmp_path / "a.safetensors", tiny_base), expected)


def test_linear_layers_as_convolutions_of_one_pixel(adapter, tiny_base, tmp_path) -> None:
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = one_of_each(plain(tiny_base))[module]
    pair = {"lora_down": a[:, :, None, None], "lora_up": b[:, :, None, None]}
    save_file(
        {f"lora_unet_{module.replace('.', '_')}.{part}.weight": value.contiguous() for part, value in pair.items()},
        tmp_path / "a.safetensors",
    )
    alike(imported(adapter, tmp_path / "a.safetensors", tiny_base), {f"{module}.weight": lora.delta(a, b, 1.0)})


# ---- what is refused ----


def refused(adapter, source) -> str:
    before = {name: value.clone() for name, value in adapter.unet.state_dict().items()}
    with pytest.raises(UserError) as caught:
        exchange.import_lora(adapter, source)
    after = adapter.unet.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"use_dora": True}, "use_dora is True"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save is ['conv_out']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_new": {"a": 1}}, "something_new is {'a': 1}"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type"),
        ({"exclude_modules": ["to_q"]}, "on a module that its settings leave out"),
        ({"layers_to_transform": [7]}, "on a module that its settings leave out"),
        ({"target_modules": ["to_q", "conv1"]}, "on a module that its settings leave out"),
        ({"target_modules": [*TARGETS, "conv_in"]}, "conv_in, but its tensors are missing"),
        ({"target_modules": [3]}, "on a module that its settings leave out"),
        ({"layers_to_transform": "x", "layers_pattern": 3}, "damaged"),
        ({"r": 3}, "has rank 4, but the settings say 3"),
        ({"r": "4"}, "rank is '4'"),
        ({"r": True}, "rank is True"),
        ({"r": 1e8}, "expected at most"),
        ({"lora_alpha": 0}, "alpha is 0"),
        ({"lora_alpha": -3}, "alpha is -3"),
        ({"lora_alpha": 1e30}, "alpha is 1e+30"),
        ({"lora_alpha": None}, "states no lora_alpha"),
        ({"lora_alpha": [8]}, "alpha is [8]"),
        ({"alpha_pattern": {"to_q": "much"}}, "alpha is 'much'"),
        ({"alpha_pattern": [3]}, "alpha_pattern is [3]"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern"),
        ({"rank_pattern": {"(a+)+$": 3}}, "too involved"),
        ({"use_rslora": "perhaps"}, "use_rslora is 'perhaps'"),
    ],
    ids=str,
)
def test_settings_of_peft_that_are_more_than_a_lora(settings, says, adapter, tiny_base, tmp_path) -> None:
    said = refused(adapter, setting(peft_folder(tiny_base, tmp_path / "peft"), **settings))
    assert says in said and "peft" in said


@pytest.mark.parametrize(
    "config", ["[]", "null", "3", "{", "", "[" * 100_000, '{"r": Infinity}', '{"r": 4}', "\ufeff{}", '"text"']
)
def test_a_damaged_configuration_of_peft(config, adapter, tiny_base, tmp_path) -> None:
    folder = peft_folder(tiny_base, tmp_path / "peft")
    (folder / "adapter_config.json").write_text(config)
    assert "damaged" in refused(adapter, folder)


def test_a_peft_folder_of_another_network_beside_ours(adapter, tiny_base, tmp_path) -> None:
    peft_folder(tiny_base, tmp_path / "unet")
    peft_folder(tiny_base, tmp_path / "text_encoder")
    assert "text_encoder' is of no network" in refused(adapter, tmp_path)


MODULE = "mid_block.resnets.0.conv1"
KOHYA = f"lora_unet_{MODULE.replace('.', '_')}"


@pytest.mark.parametrize(
    "key",
    [
        *(f"{KOHYA}.{part}" for part in ("dora_scale", "lokr_w1", "hada_w1_a", "lora_mid.weight", "diff", "diff_b")),
        *("unet.conv_in.lora_A.bias", "unet.conv_in.lora_magnitude_vector.weight", "unet.conv_in.lora_B.bias"),
        *("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", "lora_te_text_model_x.lora_up.weight"),
        *("unet.conv_norm_out.weight", "unet.class_embedding.lora_A.weight", "clip_l.x.lora_A.weight", "x", ".alpha"),
    ],
)
def test_the_first_key_that_is_left_over_is_named(key, adapter, tmp_path) -> None:
    out, kernel = lora.target_shapes(adapter, "unet")[MODULE]
    tensors = {f"{KOHYA}.lora_down.weight": torch.ones(2, *kernel), f"{KOHYA}.lora_up.weight": torch.ones(out, 2, 1, 1)}
    save_file(tensors | {key: torch.ones(out)}, tmp_path / "a.safetensors")
    said = refused(adapter, tmp_path / "a.safetensors")
    assert f"{key} is no LoRA tensor" in said and ("save the LoRA without" in said) == (
        "te" in key.split("_")[:2] or key[:4] == "text"
    )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"lora_up.weight": None}, f"{KOHYA}.lora_up.weight is missing"),
        ({"lora_down.weight": None}, f"{KOHYA}.lora_down.weight is missing"),
        ({"lora_up.weight": None, "lora_down.weight": None}, f"{KOHYA}.alpha stands alone"),
        ({"alpha": torch.tensor([1.0, 2.0])}, "alpha is a tensor (2,)"),
        ({"alpha": torch.zeros(0)}, "alpha is a tensor (0,)"),
        ({"alpha": torch.tensor(torch.nan)}, "alpha is nan"),
        ({"alpha": torch.tensor(torch.inf)}, "alpha is inf"),
        ({"alpha": torch.tensor(-1.0)}, "alpha is -1.0"),
        ({"alpha": torch.tensor(True)}, "alpha is True"),
        ({"alpha": torch.tensor(3e38)}, "alpha is"),
        ({"lora_down.weight": torch.ones(2, 3, dtype=torch.int64)}, "is of int64, expected floating point"),
        ({"lora_down.weight": torch.ones(2, 3, dtype=torch.bool)}, "is of bool"),
        ({"lora_down.weight": torch.ones(0, 8, 3, 3)}, "rank 0"),
        ({"lora_down.weight": torch.tensor(1.0)}, "rank 0"),
        ({"lora_up.weight": torch.tensor(1.0)}, "another size"),
        ({"lora_up.weight": torch.ones(16, 3, 1, 1)}, "rank 2 and"),
        ({"lora_up.weight": torch.full((16, 2, 1, 1), 1e38), "alpha": torch.tensor(1e5)}, "not finite"),
        ({"lora_up.weight": torch.full((16, 2, 1, 1), torch.nan)}, "lora_up.weight holds values that are not finite"),
    ],
)
def test_tensors_that_are_no_lora(changed, says, adapter, tmp_path) -> None:
    out, kernel = lora.target_shapes(adapter, "unet")[MODULE]
    whole = {"lora_down.weight": torch.ones(2, *kernel), "lora_up.weight": torch.ones(out, 2, 1, 1)}
    tensors = whole | {"alpha": torch.tensor(2)} | changed
    save_file({f"{KOHYA}.{part}": v for part, v in tensors.items() if v is not None}, tmp_path / "a.safetensors")
    assert says in refused(adapter, tmp_path / "a.safetensors")


def test_two_loras_on_one_module_are_refused_by_name(adapter, tiny_base, tmp_path) -> None:
    tensors = load_file(peft_folder(tiny_base, tmp_path / "peft") / "adapter_model.safetensors")
    first = next(iter(tensors)).removesuffix(".weight")
    for other in (f"{first}.second.weight", f"{first.replace('base_model.model.', 'unet.')}.weight"):
        save_file(tensors | {other: torch.ones(1)}, tmp_path / "a.safetensors")
        said = refused(adapter, tmp_path / "a.safetensors")
        assert other in said and f"{first}.weight" in said and "two LoRAs on one module" in said


def test_a_rank_that_would_fill_the_memory(adapter, tmp_path) -> None:
    """One long tensor, and all modules would have to be as long."""
    shapes = {"A": (5000, 4, 3, 3), "B": (8, 5000, 1, 1)}
    save_file({f"unet.conv_in.lora_{m}.weight": torch.zeros(s) for m, s in shapes.items()}, tmp_path / "a.safetensors")
    assert "rank is 5000, expected at most 4096" in refused(adapter, tmp_path / "a.safetensors")
