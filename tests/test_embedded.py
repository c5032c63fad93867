"""The embedded pipeline keeps what makes it fit to show reward tuning: leverage, no knob, diversity.

Leverage: a degradation that it was not trained for can be learnt, and what is learnt depends on the image. No knob: no
constant shift of the latents changes how much detail there is. Diversity: a group of outputs has something to choose
from. All on photographs that nothing was trained or chosen on.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

import rewardsr
from rewardsr import Batch, Draws, load_adapter, lora
from rewardsr.adapter import ISRAdapter
from rewardsr.demo.photos import SOFT, HeldOut, held_out, write_folders
from rewardsr.rewards import build
from rewardsr.rewards.detail import CELL, _cells, high_frequencies

TIMES = {"noise_t": 250, "net_t": 100, "scale": 4}
TEXTURE = 0.03  # root mean square of high frequencies in a cell, of [0, 1]: what shows
DRAWS = 16
SOFT_LENS = {"name": "light", "blur": [2.0, 3.0], "noise": [0.5, 1.5], "quality": [92, 97]}


def pipeline(**options) -> ISRAdapter:
    return load_adapter("osediff", "embedded", **TIMES, **options)


@torch.no_grad()
def outputs(adapter: ISRAdapter, pair: HeldOut, place: int, draws: int = DRAWS) -> Tensor:
    """(draws, 3, H, W)."""
    condition = adapter.encode(Batch(lq=pair.lq[None]))
    return torch.cat([adapter.sample(condition, Draws(1, draw, [place])) for draw in range(draws)])


@cache
def measured() -> dict[str, dict[str, float]]:
    """By photograph: PSNR (of Y) of bicubic and of the mean of draws, and variance over draws of pixels in texture."""
    adapter, psnr, found = pipeline(), build("psnr"), {}
    for place, pair in enumerate(held_out()):
        sr, batch = outputs(adapter, pair, place), Batch(lq=pair.lq[None], hq=pair.hq[None])
        bicubic = F.interpolate(batch.lq, scale_factor=4, mode="bicubic", antialias=True).clamp(0, 1)
        textured = _cells(high_frequencies(pair.hq[None]).square()).sqrt() >= TEXTURE
        variance = F.avg_pool2d(sr.var(0).mean(0)[None, None], CELL)
        found[pair.name] = {
            "bicubic": float(psnr(bicubic, batch)),
            "mean": float(psnr(sr.mean(0, keepdim=True), batch)),
            "variance": float(variance[textured].mean()),
        }
    return found


def over_images(name: str) -> float:
    return sum(figures[name] for figures in measured().values()) / len(measured())


def test_draws_differ_in_texture_and_their_mean_is_better_than_bicubic(record_property) -> None:
    deviation, gain = over_images("variance") ** 0.5, over_images("mean") - over_images("bicubic")
    worst = min(figures["mean"] - figures["bicubic"] for figures in measured().values())
    record_property(
        "deviation of draws; mean of draws against bicubic, worst", f"{deviation:.4f}; {gain:.3f}, {worst:.3f}"
    )
    assert deviation >= 0.03 and gain >= 0.5
    assert worst >= -0.2, "no photograph is far below bicubic"


def test_no_constant_shift_of_the_latents_is_a_knob_for_detail(record_property) -> None:
    """The worst direction of a tenth of the latents' standard deviation, searched for by its gradient."""
    adapter, detail = pipeline(), build("detail")
    pairs = list(held_out())
    hq = torch.stack([pair.hq for pair in pairs])
    batch = Batch(lq=torch.stack([pair.lq for pair in pairs]), hq=hq)
    with torch.no_grad():
        condition = adapter.encode(batch)
        z = adapter.sample_latents(condition, Draws(1, 0, list(range(len(pairs)))))
        length = 0.1 * float(z.std())
        base = detail(adapter.decode(z, condition), batch).mean()

    def change(shift: Tensor) -> Tensor:
        return detail(adapter.decode(z + shift[:, None, None], condition), batch).mean() - base

    worst = 0.0
    for seed in range(3):
        shift = torch.randn(z.shape[1], generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            shift = (length * shift / shift.norm()).requires_grad_()
            found = change(shift)
            worst = max(worst, abs(found.item()))
            (shift,) = torch.autograd.grad(found.sign() * found, shift)
    record_property("detail by the worst shift", f"{worst:.4f}")
    assert 0 < worst < 0.005


def test_another_degradation_can_be_learnt_and_not_by_a_constant(tmp_path, record_property) -> None:
    """Supervised, for 100 steps: what reward tuning could find is there to be found."""
    write_folders(tmp_path, SOFT)
    rewardsr.finetune(
        {
            "base": "embedded",
            "adapter_options": TIMES,
            "trainer": "naosd",
            "trainer_options": {"full": "none", "lpips_weight": 0, "vsd_weight": 0},
            "data": {"train": str(tmp_path / "train"), "crop": 64, "degradation": SOFT_LENS},
            "lora": {"rank": 8, "alpha": 8},
            "optimiser": {"learning_rate": 2e-3, "warmup": 10, "schedule": "cosine"},
            "output": str(tmp_path / "run"),
            "steps": 100,
            "batch_size": 8,
            "device": "cpu",
        }
    )
    adapter = rewardsr.load_lora(pipeline(), tmp_path / "run")
    found = rewardsr.evaluate(adapter, tmp_path / "val", ("psnr",), seed=1).rewards["psnr"]
    share = constant_share(adapter)
    record_property(
        "supervised gain, share of images; of it constant", f"{found.difference:.3f}, {found.improved:.2f}; {share:.3f}"
    )
    assert found.difference >= 0.3 and found.improved >= 0.9
    assert share < 0.5


@torch.no_grad()
def constant_share(adapter: ISRAdapter) -> float:
    """Size of the mean change of the latents, over images and places, as a share of the whole change's."""
    changes = []
    for place, pair in enumerate(held_out(SOFT)):
        batch, draws = Batch(lq=pair.lq[None]), Draws(1, 0, [place])
        with lora.reference(adapter):
            base = adapter.sample_latents(adapter.encode(batch), draws)
        changes.append(adapter.sample_latents(adapter.encode(batch), draws) - base)
    change = torch.cat(changes)
    return float(change.mean((0, 2, 3)).norm() / change.square().mean((0, 2, 3)).sum().sqrt())
