"""Pages to test with: a run and its control on pictures of one colour, with names as bad as names can be."""

import io
import json
from collections.abc import Mapping, Sequence

from PIL import Image

from rewardsr.evaluation.cast import Cast
from rewardsr.evaluation.comparison import Comparison, interval
from rewardsr.evaluation.page import EvaluationView, Page, Picture, RunView
from rewardsr.evaluation.report import Evaluation

NASTY = "</script><script>window.broken = 1</script><!--<img src=x onerror='window.broken = 2'>&amp;\u2028\".png"
RECIPE = """\
trainer: gdpo
steps: 40
rewards:
- {name: psnr, weight: 1.0}
trainer_options: {shuffle_advantages: false}
"""


def encoded(colour: Sequence[int], side: int = 24, kind: str = "PNG") -> bytes:
    """A picture of one colour whose left third is black."""
    image = Image.new("RGB", (side, side), tuple(colour))
    image.paste((0, 0, 0), (0, 0, side // 3, side))
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def compared(*differences: float) -> Comparison:
    base = tuple(0.5 + place / 100 for place in range(len(differences)))
    tuned = tuple(score + more for score, more in zip(base, differences, strict=True))
    return Comparison(base, tuned, *interval(differences))


UP, DOWN, EVEN = compared(0.2, 0.1, 0.15), compared(-0.2, -0.1, -0.15), compared(0.1, -0.1, 0.01)
SLIGHTLY_DOWN = compared(-0.004, -0.006, -0.005)


def viewed(
    name: str = "run",
    images: Sequence[str] = ("a.png", "b.png", "c.png"),
    cast: Cast | None = None,
    margins: Mapping[str, float] | None = None,
    **rewards: Comparison,
) -> EvaluationView:
    pairs = rewards or {"psnr": UP, "ssim": EVEN}
    scores = {
        "base": {metric: pair.base for metric, pair in pairs.items()},
        "tuned": {metric: pair.tuned for metric, pair in pairs.items()},
    }
    casts = {} if cast is None else {"tuned": cast}
    found = Evaluation(tuple(images), scores, 0, 1, "none", casts, margins=margins or {})
    return EvaluationView(name, json.loads(found.to_json()))


def lines(gain: float = 0.1) -> list[dict]:
    steps: list[dict] = [{"step": step, "loss": 1 / step, "group": {"tied": 0.0}} for step in range(1, 41)]
    for step in (20, 40):
        summary = {
            "base_mean": 0.5,
            "tuned_mean": 0.5 + gain,
            "difference": gain,
            "interval": [gain - 0.05, gain + 0.05],
        }
        steps.append({"step": step, "validation": {"psnr": summary}})
    return steps


def page_of_two() -> Page:
    """A run and its shuffled control, on three images; names are as bad as they can be."""
    images = (NASTY, "b.png", "c.png")
    runs = [
        RunView(
            "run", RECIPE + f"base: {json.dumps(NASTY)}\n", {"torch": NASTY}, lines(), [f"Step 3: stopped: {NASTY}"]
        ),
        RunView("control", RECIPE.replace("false", "true"), {}, lines(0.0)),
    ]
    views = [viewed("run", images, **{"psnr": UP, NASTY: EVEN}), viewed("control", images, psnr=EVEN)]
    shades = {"LQ": (90, 90, 90), "base": (100, 100, 100), "run": (110, 104, 100), "HQ": (120, 110, 100)}
    scores = {
        label: {"psnr": 0.123456, "one_name_of_a_metric_that_nothing_breaks": -12.3456} for label in ("base", "run")
    }
    pictures = [
        Picture(name, {label: encoded((r, g + place, b)) for label, (r, g, b) in shades.items()}, scores)
        for place, name in enumerate(images)
    ]
    return Page(f"report {NASTY}", runs, views, pictures)
