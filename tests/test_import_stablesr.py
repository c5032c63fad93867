"""`rewardsr import stablesr`: a released checkpoint becomes a folder of safetensors, or one clear line says why not."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _stablesr import ENCODER, UNET, released
from _support import Commands, snapshot
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rewardsr import Batch, Draws, UserError, load_adapter, lora
from rewardsr.adapters._stablesr_checkpoint import noise_share, read_checkpoint
from rewardsr.lora import exchange

pytestmark = pytest.mark.usefixtures("contacted")
EPSILON, VELOCITY = 1.0, 0.06  # times the noise: what trained networks answer


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """Tensors of a checkpoint, by what it predicts."""
    return {"epsilon": released(EPSILON), "v_prediction": released(VELOCITY), "neither": released(0.5)}


@pytest.fixture(scope="module")
def checkpoints(states, tmp_path_factory) -> dict[str, Path]:
    """The same as released files."""
    folder, made = tmp_path_factory.mktemp("released"), {}
    for kind, state in states.items():
        made[kind] = folder / f"{kind}.ckpt"
        torch.save({"state_dict": state, "global_step": 117, "epoch": 2}, made[kind])
    return made


@pytest.fixture
def spoiled(states, tmp_path) -> Callable[..., Path]:
    """A checkpoint without some keys, and with others changed."""

    def make(keep: Callable[[str], bool] = lambda key: True, **changes: Tensor) -> Path:
        path = tmp_path / "spoiled.safetensors"
        state = {key: value for key, value in states["epsilon"].items() if keep(key)}
        save_file({key: value.contiguous() for key, value in (state | changes).items()}, path)
        return path

    return make


def sample(adapter) -> Tensor:
    draws = Draws(0, 0, [0])
    lq = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return adapter.sample(adapter.encode(Batch(lq), generator=draws), draws)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_checkpoint_becomes_a_folder_that_any_command_takes(
    kind, commands, checkpoints, tiny, hq_folder, tmp_path
) -> None:
    out = tmp_path / "stablesr"
    answer = commands("import", "stablesr", checkpoints[kind], out)
    assert answer.code == 0 and f"predicts {kind}" in answer.out, answer.err
    weights = "diffusion_pytorch_model.safetensors"
    assert sorted(name for name in snapshot(out) if not name.endswith("/")) == sorted(
        f"{part}/{name}" for part in ("unet", "struct_encoder") for name in ("config.json", weights)
    )
    assert json.loads((out / "unet/config.json").read_text())["prediction_type"] == kind
    options = ("--adapter", "stablesr", "--base", tiny, "--option", f"weights={out}", "--option", "steps=2")
    answer = commands("upscale", hq_folder, "-o", tmp_path / "sr", *options, "--device", "cpu")
    assert answer.code == 0, answer.err
    assert len(list((tmp_path / "sr").glob("*.png"))) == 3


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_folder_and_its_checkpoint_are_the_same_pipeline(kind, commands, checkpoints, states, tiny, tmp_path) -> None:
    out, bare = tmp_path / "stablesr", tmp_path / "bare.safetensors"
    assert commands("import", "stablesr", checkpoints[kind], out).code == 0
    save_file({key: value.contiguous() for key, value in states[kind].items()}, bare)
    one, *others = (
        load_adapter("stablesr", tiny, weights=str(path), steps=2) for path in (out, checkpoints[kind], bare)
    )
    for other in others:
        assert other.base_model.fingerprint == one.base_model.fingerprint
        assert torch.equal(sample(other), sample(one))


def test_the_prediction_decides_what_comes_out(commands, checkpoints, tiny, tmp_path) -> None:
    """The same weights read as noise or as velocity: --no-check takes the word for it."""
    images = []
    for kind in ("epsilon", "v_prediction"):
        out = tmp_path / kind
        assert commands("import", "stablesr", checkpoints["neither"], out, "--prediction", kind, "--no-check").code == 0
        images.append(sample(load_adapter("stablesr", tiny, weights=str(out), steps=2)))
    assert float((images[0] - images[1]).abs().max()) > 1e-2


def test_merged_networks_predict_what_they_did(commands, checkpoints, tiny, tmp_path) -> None:
    """Also where the base's own UNet predicts something else: the tiny one's scheduler says epsilon."""
    assert commands("import", "stablesr", checkpoints["v_prediction"], tmp_path / "stablesr").code == 0
    adapter = load_adapter("stablesr", tiny, weights=str(tmp_path / "stablesr"), steps=2)
    before = sample(adapter)
    lora.attach(adapter)
    exchange.export(adapter, tmp_path / "merged", "merged")
    again = load_adapter("stablesr", tiny, weights=str(tmp_path / "merged"), steps=2)
    assert torch.allclose(sample(again), before, atol=1e-5)


@pytest.mark.parametrize(("kind", "share"), [("epsilon", EPSILON), ("v_prediction", VELOCITY), ("neither", 0.5)])
def test_the_trial_measures_how_much_of_the_noise_comes_back(kind, share, checkpoints) -> None:
    assert noise_share(*read_checkpoint(checkpoints[kind])) == pytest.approx(share, rel=0.02)


# ---- bad input ----


@pytest.mark.parametrize(("kind", "wanted"), [("epsilon", "v_prediction"), ("v_prediction", "epsilon")])
def test_a_checkpoint_of_another_parametrisation(kind, wanted, refused, checkpoints, tmp_path) -> None:
    line = refused("import", "stablesr", checkpoints[kind], tmp_path / "out", "--prediction", wanted)
    assert f"does not predict {wanted}" in line and f"as of {kind}" in line


def test_a_network_whose_prediction_cannot_be_told(refused, checkpoints, tiny, tmp_path) -> None:
    for more in ((), ("--prediction", "epsilon")):
        line = refused("import", "stablesr", checkpoints["neither"], tmp_path / "out", *more)
        assert "0.50 times the noise" in line and "--no-check" in line
    with pytest.raises(UserError, match=r"0\.50 times the noise"):
        load_adapter("stablesr", tiny, weights=str(checkpoints["neither"]))


def test_words_that_do_not_fit(refused, checkpoints, tmp_path) -> None:
    out = tmp_path / "out"
    line = refused("import", "stablesr", checkpoints["epsilon"], out, "--prediction", "x0")
    assert "prediction is 'x0', expected auto, epsilon or v_prediction" in line
    line = refused("import", "stablesr", checkpoints["epsilon"], out, "--no-check")
    assert "name epsilon or v_prediction" in line


def test_a_plain_stable_diffusion_checkpoint(refused, spoiled, tmp_path) -> None:
    path = spoiled(lambda key: ".spade." not in key and not key.startswith(ENCODER))
    line = refused("import", "stablesr", path, tmp_path / "out")
    assert "plain Stable Diffusion checkpoint" in line and "no spade blocks" in line


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (lambda key: not key.startswith(ENCODER), "it has spade blocks, but no encoder"),
        (lambda key: key != f"{ENCODER}fea_tran.3.out_layers.3.weight", "taps.3.conv2.weight"),
        (lambda key: key != f"{ENCODER}middle_block.1.qkv.weight", "mid_block.attentions.0.to_q.weight"),
        (lambda key: key != f"{ENCODER}input_blocks.0.0.weight", "input_blocks.0.0.weight"),
        (lambda key: "fea_tran.0." not in key, "fea_tran.0"),
        (lambda key: key != f"{UNET}input_blocks.4.0.spade.mlp_gamma.weight", "spade.mlp_gamma.weight"),
        (lambda key: key != f"{UNET}middle_block.0.out_layers.3.weight", "mid_block.resnets.0.conv2.weight"),
        (lambda key: ".op." not in key, "input_blocks.*.0.op.weight"),
        (lambda key: not key.startswith(UNET) or ".spade." in key, "as for the web UI"),
        (lambda key: not key.startswith((UNET, ENCODER)), "is no StableSR checkpoint"),
    ],
)
def test_missing_keys(keep, says, refused, spoiled, tmp_path) -> None:
    assert says in refused("import", "stablesr", spoiled(keep), tmp_path / "out")


def test_tensors_that_are_none_of_another_shape_or_not_finite(refused, spoiled, states, tmp_path) -> None:
    key = f"{UNET}input_blocks.4.0.spade.mlp_gamma.weight"
    torch.save({"state_dict": states["epsilon"] | {key: "text"}}, tmp_path / "text.ckpt")
    line = refused("import", "stablesr", tmp_path / "text.ckpt", tmp_path / "out")
    assert f"{key} is no tensor" in line
    for other in (f"{UNET}input_blocks.0.0.weight", f"{ENCODER}input_blocks.1.1.qkv.weight"):
        line = refused("import", "stablesr", spoiled(**{other: torch.zeros(7)}), tmp_path / "out")
        assert "is damaged: a tensor has another shape" in line
    line = refused("import", "stablesr", spoiled(**{key: torch.zeros(3, 3)}), tmp_path / "out")
    assert "size mismatch" in line and "spade.mlp_gamma.weight" in line
    for other in (key, f"{UNET}time_embed.0.bias", f"{ENCODER}time_embed.0.bias"):
        line = refused("import", "stablesr", spoiled(**{other: states["epsilon"][other] * math.nan}), tmp_path / "out")
        assert f"{other} holds values that are not finite" in line


def test_files_that_are_no_checkpoint(refused, checkpoints, tmp_path) -> None:
    out = tmp_path / "out"
    assert "no file" in refused("import", "stablesr", tmp_path / "nothing.ckpt", out)
    for name in ("damaged.ckpt", "damaged.safetensors"):
        (tmp_path / name).write_bytes(checkpoints["epsilon"].read_bytes()[:5000])
        assert name in refused("import", "stablesr", tmp_path / name, out)
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "expected tensors by name" in refused("import", "stablesr", tmp_path / "list.ckpt", out)


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return (os.mkdir, (self.target,))


def test_code_in_a_checkpoint_is_not_run(refused, tmp_path) -> None:
    torch.save({"state_dict": {}, "callbacks": Bomb(tmp_path / "ran")}, tmp_path / "bomb.ckpt")
    assert "it could run code" in refused("import", "stablesr", tmp_path / "bomb.ckpt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_exists_stays(refused, checkpoints, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in refused("import", "stablesr", checkpoints["epsilon"], tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_nothing_half_written_on_a_full_disk(error, refused, checkpoints, tmp_path, monkeypatch) -> None:
    from rewardsr.adapters._sft import StructEncoder

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(StructEncoder, "save_pretrained", full)
    line = refused("import", "stablesr", checkpoints["epsilon"], tmp_path / "out")
    assert "No space left on device" in line


# ---- folders ----


@pytest.fixture
def imported(commands: Commands, checkpoints, tmp_path) -> Path:
    assert commands("import", "stablesr", checkpoints["epsilon"], tmp_path / "imported").code == 0
    return tmp_path / "imported"


def test_folders_that_are_no_stablesr(refused, imported, tiny, hq_folder, tmp_path) -> None:
    def line(*options: str) -> str:
        command = ("upscale", hq_folder, "-o", tmp_path / "sr", "--adapter", "stablesr", "--base", tiny)
        return refused(*command, *(part for option in options for part in ("--option", option)))

    assert "no folder 'struct_encoder/'" in line()
    assert "plain UNet of Stable Diffusion" in line(f"weights={with_plain_unet(imported, tiny, tmp_path)}")
    assert "tile is 60, expected a multiple of 8 latents" in line(f"weights={imported}", "tile=60")
    config = imported / "unet" / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"prediction_type": "sample"}))
    assert "prediction type 'sample' is not epsilon or v_prediction" in line(f"weights={imported}")
    config.write_text(whole)
    config = imported / "struct_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"heads": "many"}))
    assert "does not load as StructEncoder" in line(f"weights={imported}")
    config.unlink()
    assert "missing or damaged" in line(f"weights={imported}")
    (imported / "struct_encoder" / "diffusion_pytorch_model.safetensors").unlink()
    assert "'struct_encoder/'" in line(f"weights={imported}") or "config.json" in line(f"weights={imported}")


def with_plain_unet(imported: Path, tiny: str, tmp_path: Path) -> Path:
    """The imported folder with the UNet of the base."""
    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "struct_encoder").symlink_to(imported / "struct_encoder")
    (folder / "unet").symlink_to(Path(tiny) / "unet")
    return folder


def test_a_base_of_another_text_width(imported, tiny_base) -> None:
    with pytest.raises(UserError, match="the UNet attends to 32"):
        load_adapter("stablesr", str(tiny_base), weights=str(imported))


def test_an_encoder_of_another_size(imported, tiny, tmp_path) -> None:
    from rewardsr.adapters._sft import StructEncoder

    sizes = {"norm_num_groups": 4, "layers_per_block": 1, "heads": 2}
    for index, (options, says) in enumerate(
        [
            ({"block_out_channels": (8, 8), "attention": (True, False), "out_channels": 32}, "encoder 2"),
            ({"block_out_channels": (8,) * 4, "attention": (False,) * 4, "out_channels": 8}, "gives 8 features"),
        ]
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "unet").symlink_to(imported / "unet")
        StructEncoder(**sizes, **options).save_pretrained(folder / "struct_encoder")
        with pytest.raises(UserError, match=says):
            load_adapter("stablesr", tiny, weights=str(folder))
