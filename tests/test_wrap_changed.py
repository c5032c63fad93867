"""Live pipelines that were changed to run faster or smaller: the LoRA on the right modules, or one line why not."""

from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import rewardsr
from rewardsr import UserError, lora


@pytest.fixture
def pipe(tiny_base):
    path = Path(tiny_base)
    return diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(path / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(path / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer", model_max_length=77),
        unet=diffusers.UNet2DConditionModel.from_pretrained(path / "unet"),
        scheduler=diffusers.DDPMScheduler.from_pretrained(path / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory) -> Path:
    adapter = rewardsr.load_adapter("osediff", tiny_base, noise_t=250)
    lora.attach(adapter, 2)
    random = torch.Generator().manual_seed(0)
    for value in lora.parameters(adapter).values():
        value.data = 0.1 * torch.randn(value.shape, generator=random)
    return lora.save(adapter, tmp_path_factory.mktemp("saved"))


@torch.no_grad()
def run(network) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return network(torch.randn(1, 4, 8, 8, generator=random), 100, torch.randn(1, 7, 16, generator=random)).sample


def in_place(pipe) -> None:
    pipe.unet.compile(backend="eager")


def compiled(pipe) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


@pytest.mark.parametrize("change", [in_place, compiled])
def test_a_lora_reaches_a_compiled_network(change, pipe, saved, tiny_base) -> None:
    change(pipe)
    plain = run(pipe.unet)
    adapter = rewardsr.load_lora(pipe, saved)
    expected = rewardsr.load_adapter("osediff", tiny_base, noise_t=250)
    assert torch.equal(plain, run(expected.unet))
    lora.load(expected, saved)
    assert lora.parameters(adapter).keys() == lora.parameters(expected).keys()
    assert torch.equal(run(pipe.unet), run(expected.unet)) and torch.equal(run(adapter.unet), run(expected.unet))
    assert not torch.equal(run(pipe.unet), plain)
    lora.set_scale(adapter, 0)
    assert torch.equal(run(pipe.unet), plain)


def fuse(pipe) -> None:
    pipe.fuse_qkv_projections()


def fuse_the_vae(pipe) -> None:
    pipe.vae.fuse_qkv_projections()


def compile_a_block(pipe) -> None:
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")


def parallel(pipe) -> None:
    vars(pipe)["unet"] = torch.nn.DataParallel(pipe.unet)


def offload(pipe) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, torch.device("cpu"))


def offload_the_model(pipe) -> None:
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.vae, torch.device("cpu"))


def offload_the_text_encoder(pipe) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.text_encoder, torch.device("cpu"))


def empty(pipe) -> None:
    pipe.unet.to("meta")


def cast_by_layer(pipe) -> None:
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def cast_to_fp8(pipe) -> None:
    pipe.unet.to(torch.float8_e4m3fn)


def mix(pipe) -> None:
    pipe.unet.mid_block.to(torch.bfloat16)


def halve_the_vae(pipe) -> None:
    pipe.vae.to(torch.float16)


def double(pipe) -> None:
    pipe.unet.to(torch.float64)


class Packed(torch.nn.Parameter):
    """As quantising libraries have their weights."""


def quantise(pipe) -> None:
    layer = pipe.unet.time_embedding.linear_1
    layer.weight = Packed(torch.zeros(32, 4, dtype=torch.uint8), requires_grad=False)


class WithState(torch.nn.Linear):
    """As layers of 8-bit libraries are, whose state holds more than tensors."""

    def get_extra_state(self):
        return {"scale": 1.0}

    def set_extra_state(self, state) -> None: ...


def pack(pipe) -> None:
    pipe.unet.time_embedding.linear_1 = WithState(8, 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pack, "which is no tensor: quantised or sharded"),
        (fuse, "fused projections: call its unfuse_qkv_projections"),
        (fuse_the_vae, "the vae of StableDiffusionPipeline has fused projections"),
        (compile_a_block, "compiled in pieces"),
        (parallel, "DataParallel"),
        (offload, "the unet of StableDiffusionPipeline is offloaded"),
        (offload_the_model, "the vae of StableDiffusionPipeline is offloaded"),
        (offload_the_text_encoder, "the text_encoder of StableDiffusionPipeline is offloaded"),
        (empty, "meta"),
        (cast_by_layer, "layer by layer"),
        (cast_to_fp8, "float8_e4m3fn"),
        (mix, "mixes bfloat16 and float32"),
        (halve_the_vae, "float32 and its vae in float16"),
        (double, "float64"),
        (quantise, "weights of uint8 (Packed), quantised"),
    ],
)
@pytest.mark.parametrize("way", ["wrap", "load_lora", "by name"])
def test_what_cannot_carry_a_lora_is_refused_in_one_line(way, change, says, pipe, saved) -> None:
    change(pipe)
    with pytest.raises(UserError) as caught:
        if way == "load_lora":
            rewardsr.load_lora(pipe, saved)
        else:
            rewardsr.wrap(pipe, *(["osediff"] if way == "by name" else []))
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not any("lora_" in name for name, _ in pipe.unet.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_beside_an_autoencoder_of_float32_works(dtype, pipe) -> None:
    """What is common: the autoencoder of some pipelines overflows in half precision."""
    pipe.unet.to(dtype)
    adapter = rewardsr.wrap(pipe)
    assert adapter.sample(adapter.encode(torch.rand(1, 3, 8, 8))).isfinite().all()


def test_fused_later_it_is_refused_by_the_lora_itself(pipe) -> None:
    adapter = rewardsr.wrap(pipe, noise_t=250)
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(UserError, match="fused projections"):
        lora.attach(adapter)
    assert not lora.names(adapter)


def test_quantised_later_as_well(pipe) -> None:
    adapter = rewardsr.wrap(pipe, noise_t=250)
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight = Packed(torch.zeros(16, 16))
    with pytest.raises(UserError, match=r"attn1\.to_q' is quantised"):
        lora.attach(adapter)
    assert not lora.names(adapter)


def test_a_pipeline_object_of_ones_own_counts_as_well(pipe) -> None:
    own = SimpleNamespace(
        unet=pipe.unet, vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, scheduler=pipe.scheduler
    )
    compiled(own)
    adapter = rewardsr.wrap(own)
    lora.attach(adapter)
    assert all("_orig_mod" not in name for name in lora.parameters(adapter))
