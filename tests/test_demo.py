"""`rewardsr demo` from end to end on small pictures, and what it says of a result."""

import json
import logging
from pathlib import Path

import pytest

from rewardsr.data.images import list_images, read_image, write_image
from rewardsr.demo import photos, run
from rewardsr.errors import UserError
from rewardsr.evaluation.cast import Cast, OffsetTest
from rewardsr.evaluation.comparison import Comparison
from rewardsr.evaluation.report import Evaluation
from rewardsr.run_folder import LORA, REPORT


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """Two pictures to tune on and two held out, much smaller than the package's."""
    for name, side in (("TRAIN", 64), ("HELD_OUT", 96)):
        for path in list_images(getattr(photos, name))[:2]:
            write_image(read_image(path)[:, :side, :side], tmp_path / name / f"{path.stem}.png")
        monkeypatch.setattr(photos, name, tmp_path / name)
    return tmp_path


def test_it_runs_to_its_end(small, caplog) -> None:
    output = small / "out"
    with caplog.at_level(logging.INFO, "rewardsr"):
        run.run_demo(output, steps=1)
    assert all((output / name / LORA).is_file() for name in ("gdpo", "rfsr", run.SHUFFLED))
    assert {path.name for path in output.glob("*.json")} == {"gdpo.json", "rfsr.json", f"{run.SHUFFLED}.json"}
    picture = read_image(output / "closeups.png")
    assert picture.shape[2] == 5 * run.CLOSEUP * run.ZOOM + 4 * 4, "LQ, base, gdpo, rfsr, HQ"
    assert len(list_images(output / "upscaled")) == 2
    assert json.loads((output / "rfsr.json").read_text())["margins"]["psnr"] == 0.1
    page = (output / REPORT).read_text()
    assert caplog.text.index("look at this first     " + str(output / REPORT)) > caplog.text.index("done in")
    assert (
        '"runs":["gdpo","rfsr","gdpo-shuffled"]' in page and 'id="cast"' in page and page.count("data:image/webp") == 10
    )
    assert "shuffled" in caplog.text and "8-bit rounding" in caplog.text and "done in" in caplog.text
    with pytest.raises(UserError, match="is not empty"):
        run.run_demo(output)


def evaluation(alone: float, without: float, spread: float = 0.0, guard: float = 0.0, gain: float = 0.04) -> Evaluation:
    """A gain, which differs by `spread` between the images, with what an offset gives of it."""
    base = (0.2, 0.3)

    def changed(change: float, spread: float = 0.0) -> tuple[float, ...]:
        return base[0] + change - spread, base[1] + change + spread

    tuned = {name: changed(guard) for name in run.METRICS} | {run.TARGET: changed(gain, spread)}
    tests = {
        name: OffsetTest(
            Comparison.of(base, scores),
            Comparison.of(base, changed(alone)),
            Comparison.of(base, changed(without)),
            Comparison.of(changed(alone), scores),
        )
        for name, scores in tuned.items()
    }
    scores = {"base": dict.fromkeys(run.METRICS, base), "tuned": tuned}
    return Evaluation(("a", "b"), scores, 0, 1, "none", {"tuned": Cast((0.0,), "these", tests)})


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        (evaluation(0.001, 0.039), []),
        (evaluation(0.03, 0.01), ["alone gives less than half", "more than half is left"]),
        (evaluation(0.0, 0.04, spread=0.01), ["a gain", "beyond the drift"]),
        (evaluation(0.0, 0.04, guard=-0.05), ["guard ssim", "guard structure", "guard lq_consistency"]),
    ],
    ids=["good", "cast", "no gain", "guards"],
)
def test_the_verdict_claims_what_the_table_shows(found, refused) -> None:
    control = evaluation(0.0, 0.0, gain=0.001)
    said = run.verdict(found, control).splitlines()
    no = [line for line in said if line.endswith("NO")]
    assert len(no) == len(refused) and all(part in line for part, line in zip(refused, no, strict=True))
    assert len(said) == 5 + len(run.GUARDS)
    assert len(run.verdict(found, None).splitlines()) == 4 + len(run.GUARDS), "without a control"
