"""For authors of adapters and rewards, and for our own tests: tiny real pipelines, and checks that say what is wrong.

`rewardsr.draws.Replay` gives back recorded noise where a test must follow a recorded run.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewardsr import lora
from rewardsr.adapter import Batch, ISRAdapter
from rewardsr.draws import Draws, Replay
from rewardsr.rewards.base import Reward

__all__ = ["Replay", "check_adapter", "check_reward", "tiny_pipeline", "write_images"]

TEXT_WIDTH = 16
EQUAL = 1e-4  # rows of a batch against the same rows alone: other summation orders, float32


def tiny_pipeline(folder: Path | str, seed: int = 0, autoencoder: str = "kl", family: str = "sd") -> Path:
    """Write a Stable-Diffusion-shaped pipeline with a few thousand random weights, in diffusers' folder layout.

    Args:
        folder: where to; made if need be.
        seed: of the weights.
        autoencoder: "kl" (AutoencoderKL, f=4, 4 channels) or "dc" (AutoencoderDC, f=4, without a posterior).
        family: "sd", "upscaler", which diffusers' StableDiffusionUpscalePipeline loads, or "stablesr", whose folder
            holds StableSR's own networks as well.

    Returns:
        The folder.
    """
    from rewardsr.demo.train_pipeline import write_tokenizer

    folder = Path(folder)
    components = _tiny_schedulers(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        components["unet"] = _tiny_unet(family)
        # diffusers' upscaler knows one scaling factor only, and sets it.
        components["vae"] = _tiny_autoencoder(autoencoder, scaling_factor=0.08333 if family == "upscaler" else 0.5)
        components["text_encoder"] = _tiny_text_encoder()
        if family == "stablesr":
            components["struct_encoder"] = _tiny_struct_encoder(components["unet"])
    tokenizer = write_tokenizer(folder / "tokenizer")
    if family == "upscaler":  # diffusers' pipeline asks for more files: how long prompts are, and which class is what
        components["tokenizer"] = tokenizer
        parts = {part: [type(of).__module__.partition(".")[0], type(of).__name__] for part, of in components.items()}
        index = {"_class_name": "StableDiffusionUpscalePipeline", **parts}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    for name, component in components.items():
        component.save_pretrained(folder / name)
    return folder


def _tiny_schedulers(family: str) -> dict[str, Any]:
    """The schedulers of a family, by the name of their folder, as its released pipelines have them."""
    import diffusers

    if family in ("sd", "stablesr"):
        options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
        # Random noise, predicted at the last times, would saturate the image; random velocity does not.
        prediction = "v_prediction" if family == "stablesr" else "epsilon"
        return {"scheduler": diffusers.DDPMScheduler(**options, prediction_type=prediction)}
    if family == "upscaler":
        options = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "scaled_linear", "clip_sample": False}
        ddim = diffusers.DDIMScheduler(
            **options, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1
        )
        return {"scheduler": ddim, "low_res_scheduler": diffusers.DDPMScheduler(**options)}
    raise ValueError(f"unknown family '{family}': expected sd, upscaler or stablesr")


def _tiny_unet(family: str) -> Any:
    import diffusers

    # An upscaler's takes the LQ image beside the latents, and how noisy that is as a class.
    options = {"in_channels": 7, "num_class_embeds": 50} if family == "upscaler" else {"in_channels": 4}
    return diffusers.UNet2DConditionModel(
        **options,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
    )


def _tiny_struct_encoder(unet: Any) -> Any:
    """The encoder of a tiny StableSR; its features modulate the UNet from now on."""
    from rewardsr.adapters._sft import StructEncoder, add_modulation

    add_modulation(unet, features=8, hidden=8)
    return StructEncoder(
        out_channels=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention=(True, False),
        heads=2,
        norm_num_groups=4,
    )


def _tiny_autoencoder(kind: str, scaling_factor: float) -> Any:
    import diffusers

    if kind == "kl":
        return diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=scaling_factor,
        )
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(0, 1, 1),
        decoder_layers_per_block=(0, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=scaling_factor,
    )


def _tiny_text_encoder() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=512,
            eos_token_id=513,
        )
    )


def write_images(folder: Path | str, count: int = 4, size: int = 48, seed: int = 0) -> Path:
    """Write PNGs with edges, gradients and texture, for tests that need a data folder; returns the folder."""
    from rewardsr.data.images import write_image

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(0, 1, size)
    for index in range(count):
        turn, colours = torch.rand(2, generator=random), torch.rand(3, 1, 1, generator=random)
        waves = torch.sin(20 * (turn[0] * ramp[:, None] + turn[1] * ramp[None, :]))
        texture = 0.1 * torch.randn(3, size, size, generator=random)
        write_image((0.5 + 0.3 * colours * waves.sign() + 0.2 * ramp + texture).clamp(0, 1), folder / f"{index:03}.png")
    return folder


def check_adapter(adapter: ISRAdapter) -> None:
    """Check an adapter against the contract of `rewardsr.adapter`, on a 12 x 10 image; leaves a LoRA attached.

    Raises:
        AssertionError: lists everything that is wrong, one line each.
    """
    problems = list(_adapter_problems(adapter))
    if problems:
        raise AssertionError(
            f"adapter '{adapter.name}' breaks the contract:\n" + "\n".join(f"- {line}" for line in problems)
        )


def check_reward(reward: Reward, side: int = 32) -> None:
    """Check a reward against the contract of `rewardsr.rewards.base`.

    Args:
        reward: the reward.
        side: of the images it is tried on, in pixels.

    Raises:
        AssertionError: lists everything that is wrong, one line each.
    """
    problems = list(_reward_problems(reward, side))
    if problems:
        raise AssertionError(
            f"reward '{reward.name}' breaks the contract:\n" + "\n".join(f"- {line}" for line in problems)
        )


def _adapter_problems(adapter: ISRAdapter) -> Iterator[str]:
    for attribute in (
        "scale",
        "size_multiple",
        "schedule",
        "steps",
        "networks",
        "trainable",
        "lora_targets",
        "base_model",
    ):
        if not hasattr(adapter, attribute):
            yield f"attribute '{attribute}' is missing"
            return
    batch = Batch(lq=torch.rand(2, 3, 12, 10, generator=torch.Generator().manual_seed(0)), prompts=("a photo", "a cat"))
    try:
        with torch.no_grad():
            yield from _shape_problems(adapter, batch)
            yield from _draw_problems(adapter, batch)
        yield from _lora_problems(adapter, batch)
    except Exception as error:  # an author wants the message, whatever the kind
        yield f"raised {type(error).__name__}: {error}"


def _shape_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    condition = adapter.encode(batch)
    expected = (batch.lq.shape[-2] * adapter.scale, batch.lq.shape[-1] * adapter.scale)
    if condition.size != expected:
        yield f"encode: condition.size is {condition.size}, expected scale x lq = {expected}"
    z = adapter.start(condition, Draws(0, 0, [0, 1]))
    yield from _tensor_problems("start", z, tuple(condition.latents.shape))
    prediction = adapter.predict(z, adapter.net_t, condition)
    yield from _tensor_problems("predict", prediction, tuple(z.shape))
    image = adapter.to_image(z)
    latents = adapter.to_latents(image.clamp(0, 1))
    yield from _tensor_problems("to_latents", latents, tuple(z.shape))
    for height, width in ((1, 1), (7, 5)):
        sr = adapter.sample(adapter.encode(torch.rand(1, 3, height, width)), Draws(0, 0, [0]))
        yield from _tensor_problems("sample", sr, (1, 3, height * adapter.scale, width * adapter.scale))
    try:
        adapter.encode(batch.lq * 2 - 1)
        yield "encode: accepts images in [-1, 1]; keep the public method and write _encode"
    except ValueError:
        pass


def _draw_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    def run(indices: list[int], seed: int) -> Tensor:
        rows = Batch(lq=batch.lq[indices], prompts=tuple((batch.prompts or ())[i] for i in indices))
        draws = Draws(seed, 0, indices)
        return adapter.sample(adapter.encode(rows, generator=draws), draws)

    both = run([0, 1], 0)
    if not torch.equal(both, run([0, 1], 0)):
        yield "sample: two runs with equal draws differ; take all randomness from rewardsr.draws.draw"
    if float((both[1:] - run([1], 0)).abs().max()) > EQUAL:
        yield "sample: a row depends on the other rows of its batch"
    differ = not torch.equal(both, run([0, 1], 1))
    condition = adapter.encode(batch)
    by_start = not torch.equal(
        adapter.start(condition, Draws(0, 0, [0, 1])), adapter.start(condition, Draws(1, 0, [0, 1]))
    )
    if adapter.deterministic and by_start:
        yield "deterministic is True, but start draws noise"
    if not adapter.deterministic and not (differ and by_start):
        yield "deterministic is False, but other draws give the same start"


def _lora_problems(adapter: ISRAdapter, batch: Batch) -> Iterator[str]:
    condition = adapter.encode(batch)
    z = adapter.start(condition, Draws(0, 0, [0, 1]))
    with torch.no_grad():
        before = adapter.predict(z, adapter.net_t, condition)
    if not lora.attached(adapter):
        lora.attach(adapter)
        with torch.no_grad():
            if not torch.equal(before, adapter.predict(z, adapter.net_t, condition)):
                yield "a fresh LoRA changes the output"
    adapter.predict(z, adapter.net_t, condition).square().mean().backward()
    unreached = [name for name, parameter in lora.parameters(adapter).items() if parameter.grad is None]
    if unreached:
        yield f"predict: no gradient reaches {len(unreached)} LoRA tensors (first: {unreached[0]})"
    for parameter in lora.parameters(adapter).values():
        parameter.grad = None
    for name, hook in (("to_image", adapter.to_image), ("to_latents", lambda x: adapter.to_latents(x))):
        given = z.detach() if name == "to_image" else torch.rand(1, 3, *condition.size)
        given = given.to(adapter.device).requires_grad_()
        if not _differentiable(hook, given):
            yield f"{name}: gradients do not follow"


def _differentiable(hook: Callable[[Tensor], Tensor], given: Tensor) -> bool:
    result = hook(given)
    if not result.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(result.square().mean(), given)
    return bool(gradient.isfinite().all() and gradient.any())


def _tensor_problems(what: str, tensor: Tensor, shape: tuple[int, ...]) -> Iterator[str]:
    if tuple(tensor.shape) != shape:
        yield f"{what}: gave {tuple(tensor.shape)}, expected {shape}"
    if tensor.dtype != torch.float32:
        yield f"{what}: gave {tensor.dtype}, expected float32"
    if not tensor.isfinite().all():
        yield f"{what}: gave values that are not finite"


def _reward_problems(reward: Reward, side: int) -> Iterator[str]:
    for attribute in ("name", "differentiable", "needs_hq", "licence", "kind"):
        if not hasattr(reward, attribute):
            yield f"attribute '{attribute}' is missing"
            return
    if reward.kind not in ("fidelity", "detail"):
        yield f"kind is '{reward.kind}', expected 'fidelity' or 'detail'"
    random = torch.Generator().manual_seed(0)
    hq = torch.rand(3, 3, side, side, generator=random)
    lq = torch.nn.functional.interpolate(hq, scale_factor=0.25, mode="area")
    sr = (hq + 0.1 * torch.randn(hq.shape, generator=random)).clamp(0, 1)
    batch = Batch(lq=lq, hq=hq if reward.needs_hq else None, prompts=("a photo", "a cat", ""))
    try:
        yield from _score_problems(reward, sr, batch)
    except Exception as error:  # an author wants the message, whatever the kind
        yield f"raised {type(error).__name__}: {error}"


def _score_problems(reward: Reward, sr: Tensor, batch: Batch) -> Iterator[str]:
    scores = reward(sr, batch)
    yield from _tensor_problems("score", scores, (3,))
    if tuple(scores.shape) != (3,):
        return
    alone = torch.cat([reward(sr[i : i + 1], batch.rows(torch.tensor([i]))) for i in range(3)])
    if alone.shape == scores.shape and float((alone - scores).abs().max()) > EQUAL * (1 + float(scores.abs().max())):
        yield "a score depends on the other images of its batch"
    if reward.differentiable and not _differentiable(lambda x: reward(x, batch), sr.clone().requires_grad_()):
        yield "differentiable is True, but its gradient is zero, not finite or cut"
