"""Guards: what is watched, what a verdict is, and a run that is hacked: it stops, says why and ships its best."""

import json
import logging

import pytest
import torch
from runs import assert_equal_runs, content, lines, weights

import rewardsr
from rewardsr import UserError
from rewardsr.errors import TrainingError
from rewardsr.evaluation.page import read_page
from rewardsr.evaluation.report import Comparison, Evaluation
from rewardsr.hub.card import build_card
from rewardsr.hub.content import read_run
from rewardsr.options import parse
from rewardsr.rewards import build, known
from rewardsr.run_folder import ENDING
from rewardsr.train import ending, log
from rewardsr.train.guards import Guards, build_guards, named_guards
from rewardsr.train.loop import Result
from rewardsr.train.recipe import Recipe, to_yaml
from rewardsr.train.recipe_guards import PANEL_OF, StopRecipe

WITH_HQ = ["psnr", "ssim", "lq_consistency", "high_frequency", "color_shift", "clipping", "periodic_pattern"]
WITHOUT = ["lq_consistency", "high_frequency_lq", "color_shift", "clipping", "periodic_pattern"]


def recipe(**changes) -> Recipe:
    least = {"base": "b", "data": {"train": "t", "validation": "v"}, "output": "o", "steps": 1}
    return parse(Recipe, least | {"rewards": [{"name": "sharpness"}]} | changes, "recipe")


# ---- what is watched ----


def test_by_default_a_panel_watches_that_needs_no_download() -> None:
    assert list(named_guards(recipe(), has_hq=True)) == WITH_HQ
    assert list(named_guards(recipe(), has_hq=False)) == WITHOUT
    needs_hq = {row.name: row.needs_hq for row in known()}
    assert not any(needs_hq[name] for name in PANEL_OF[False])


def test_the_panel_is_added_to_changed_or_emptied() -> None:
    more = recipe(guards=["panel", "detail", {"name": "psnr", "margin": 0.25}])
    assert list(named_guards(more, has_hq=True)) == [*WITH_HQ, "detail"]
    guards, margins = build_guards(more, {}, has_hq=True)
    assert margins["psnr"] == 0.25 and margins["ssim"] == build("ssim").margin
    assert "detail" in guards and "detail" not in margins, "without a margin it only watches"
    assert named_guards(recipe(guards=[]), has_hq=True) == {}
    assert parse(Recipe, json.loads(more.model_dump_json()), "again") == more
    assert "- panel\n- detail\n- name: psnr\n  margin: 0.25\n" in to_yaml(more)


def test_a_reward_that_steers_guards_only_where_it_is_named() -> None:
    steering = {"rewards": [{"name": "psnr"}, {"name": "detail", "weight": 0}]}
    assert "psnr" not in named_guards(recipe(**steering), has_hq=True)
    rewards = {"psnr": build("psnr"), "detail": build("detail")}
    named = recipe(**steering, guards=["psnr", {"name": "detail", "margin": 1}])
    guards, margins = build_guards(named, rewards, has_hq=True)
    assert (guards, margins) == ({}, {"psnr": 1.0, "detail": 1.0}), "both are built already"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guards": ["psnr", {"name": "psnr", "margin": 1}]}, "guards: a name occurs twice"),
        ({"guards": [{"name": "panel", "margin": 1}]}, "margins of their own"),
        ({"guards": [{"name": "psnr", "margin": -1}]}, "guards.0.margin"),
        ({"guards": "psnr"}, "expected a list of names"),
        ({"guards": [{"name": "psnr", "weight": 1}]}, "unknown key 'guards.0.weight'"),
        ({"stop_when": {"in_row": 2}}, "unknown key 'stop_when.in_row': did you mean 'in_a_row'"),
        ({"stop_when": {}, "rewards": []}, "stop_when compares guards with rewards that steer"),
        ({"keep_best": True, "data": {"train": "t"}}, "keep_best looks at held-out images: give data.validation"),
        ({"cast_test": True, "data": {"train": "t"}}, "cast_test looks at held-out images"),
    ],
)
def test_what_cannot_work_is_refused(changes, said) -> None:
    with pytest.raises(UserError, match=said):
        recipe(**changes)


# ---- verdicts ----


def compared(base: tuple[float, ...], change: float) -> Comparison:
    return Comparison(base, tuple(value + change for value in base), change, change)


def judged(changes: list[tuple[float, float]], stop: StopRecipe | None = None) -> Guards:
    """A run whose reward and guard change so; base scores 1, 3 and 20, 22: a deviation of 1.414 each."""
    guards = Guards({"sharpness": 2.0}, {"psnr": 1.0}, stop)
    for step, (reward, guard) in enumerate(changes):
        found = {"sharpness": compared((1.0, 3.0), reward), "psnr": compared((20.0, 22.0), guard)}
        guards.judge(step, found)
    return guards


def test_the_gain_is_in_deviations_of_the_base_by_weight() -> None:
    guards = Guards({"a": 3.0, "b": 1.0}, {}, None)
    said = guards.judge(5, {"a": compared((1.0, 3.0), 2**0.5), "b": compared((4.0,), 2.0)})
    assert said == {"guards": {"gain": pytest.approx((3 * 1 + 1 * 2) / 4), "beyond": {}}}
    assert Guards({}, {"a": 1.0}, None).judge(5, {"a": compared((1.0,), -9.0)}) == {}, "nothing steers"


def test_a_fall_beyond_the_margin_while_the_reward_rises_stops_when_it_comes_twice_in_a_row() -> None:
    rule = StopRecipe()
    assert judged([(0, 0), (1, -1.0), (2, -1.0)], rule).stopped is None, "at its margin it is within"
    assert judged([(0, 0), (1, -1.1)], rule).stopped is None
    assert judged([(1, -1.1), (2, -0.9), (3, -1.1)], rule).stopped is None
    assert judged([(-1, -1.1), (-2, -1.2)], rule).stopped is None, "nothing has risen"
    assert judged([(1, -1.1), (1, -1.2)], None).stopped is None
    assert judged([(1, -1.1)], StopRecipe(in_a_row=1)).stopped == (
        "psnr -1.1 (margin 1) against the base, while sharpness +1"
    )
    assert judged([(1, 0), (2, -1.1), (3, -1.25)], rule).stopped == (
        "psnr -1.25 (margin 1) against the base, while sharpness +3, the last of 2 such validations in a row"
    )
    assert judged([(1, -1.1), (1, -1.2)], StopRecipe(gain=1.0)).stopped is None, "1 is 0.7 deviations"


def test_the_best_has_the_largest_gain_within_the_margins() -> None:
    best = judged([(9, 0), (1, 0), (3, -0.5), (2, 0), (8, -1.1)]).best
    assert best is not None and best.step == 2, "of step 0 there is no checkpoint"
    assert judged([(0, 0), (1, -1.1)]).best is None and judged([(0, 0), (-1, 0)]).best is None


def test_a_log_gives_the_same_verdicts(caplog) -> None:
    guards = judged([(0, 0), (1, 0), (2, -1.1), (3, -1.2)], StopRecipe())
    assert "step 3: psnr -1.2 (margin 1) against the base, while sharpness +3" in caplog.messages
    log = []
    for verdict in guards.verdicts:
        found = {"sharpness": {"difference": verdict.rewards["sharpness"]}, "psnr": {}}
        told = {"gain": verdict.gain, "beyond": verdict.beyond}
        log.append(json.loads(json.dumps({"step": verdict.step, "validation": found, "guards": told})))
    again = Guards({"sharpness": 2.0}, {"psnr": 1.0}, StopRecipe())
    again.read([*log, {"step": 4, "validation": {"psnr": {"difference": 1}}}], kept=[1, 2, 3])
    assert (again.verdicts, again.stopped, again.best) == (guards.verdicts, guards.stopped, guards.best)
    again = Guards({"sharpness": 2.0}, {"psnr": 1.0}, StopRecipe())
    again.read(log, kept=[2, 3])
    assert again.best is None, "its checkpoint is gone"


# ---- a run that is hacked ----

MARGIN = {"name": "color_shift", "margin": 0.1}


def hacked(folder, output: str, **changes) -> dict:
    """Brighter is better, and colours shift with it: beyond their margin from step 6 on, so it ends at step 8 of 12."""
    own = {
        "trainer": "rfsr",
        "trainer_options": {"structure_weight": 0, "kl_weight": 0, "text_dropout": 0, "ema": 0.5},
        "guards": [MARGIN],
        "stop_when": {},
        "cast_test": True,
        "validate_every": 2,
        "checkpoint_every": 100,
        "keep_checkpoints": 1,
        "optimiser": {"learning_rate": 3e-3, "warmup": 0, "schedule": "constant"},
        "data": {"validation": str(folder / "images")},
    }
    return content(folder, str(folder / "base"), output, **(own | changes))


@pytest.fixture(scope="module")
def stopped(folder) -> Result:
    return rewardsr.finetune(hacked(folder, "stopped"))


def test_it_stops_says_why_and_ships_the_best(stopped) -> None:
    run = stopped.output
    assert (stopped.step, stopped.finished, stopped.shipped) == (8, True, 4)
    assert stopped.stopped.startswith("color_shift -0.") and "(margin 0.1)" in stopped.stopped
    assert "stopped by its guards after 8 steps, with the weights of step 4" in str(stopped)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000008"]
    ours, best = weights(run), weights(run / "checkpoints" / "step-00000004")
    assert all(torch.equal(value, best[name]) for name, value in ours.items())
    record = json.loads((run / ENDING).read_text())
    assert (record["step"], record["shipped"], record["best"], record["stopped"]) == (8, 4, 4, stopped.stopped)
    told = {line["step"]: line["guards"] for line in lines(run) if "guards" in line}
    assert list(told) == [0, 2, 4, 6, 8]
    assert [step for step, entry in told.items() if entry["beyond"]] == [6, 8]
    assert (
        stopped.validation == next(line for line in lines(run) if line["step"] == 4 and "guards" in line)["validation"]
    )


def test_its_cast_test_is_that_of_what_it_ships(stopped) -> None:
    found = json.loads((stopped.output / "validation" / "step-00000004.json").read_text())
    assert found["casts"]["tuned"]["measured_on"] == "3 training images"
    read = Evaluation.from_dict(found)
    assert read.rewards["color_shift"].difference == stopped.validation["color_shift"]["difference"]
    assert "casts" not in json.loads((stopped.output / "validation" / "step-00000008.json").read_text())


def test_its_page_shows_what_it_ships(stopped) -> None:
    page = read_page([stopped.output])
    assert page.evaluations[0].evaluation.rewards["color_shift"].difference == pytest.approx(
        stopped.validation["color_shift"]["difference"]
    )
    assert page.evaluations[0].evaluation.margins == {"color_shift": 0.1}
    folder = stopped.output / "validation" / "pictures"
    shown = [picture.images["tuned"] for picture in page.pictures]
    assert shown == [(folder / f"{place:04d}-step-00000004.webp").read_bytes() for place in range(len(shown))] != []
    assert page.runs[0].notes[-1].startswith("Stopped by its guards: color_shift -0.")
    assert page.runs[0].notes[-1].endswith("Its weights are those of step 4.")


def test_it_is_a_finished_run_for_upscale_and_for_the_hub(stopped, folder, commands, tmp_path) -> None:
    files, _ = read_run(stopped.output)
    assert json.loads(files["samples/validation.json"])["casts"], "that of the weights which are published"
    card = build_card(stopped.output, "ada/lora")
    assert "Its guards stopped the run after step 8 of 12: color_shift -0." in card
    assert "These are the weights of step 4" in card and "4 steps of" in card
    answer = commands("upscale", folder / "images" / "000.png", "--run", stopped.output, "-o", tmp_path / "out")
    assert answer.code == 0, answer.err


def test_the_command_tells_and_leaves_with_code_0(stopped, folder, commands) -> None:
    path = folder / "hacked.yaml"
    path.write_text(to_yaml(parse(Recipe, hacked(folder, "stopped"), "recipe")))
    before = weights(stopped.output)
    answer = commands("finetune", path, "--resume")  # it has ended: nothing is trained, and all is said again
    assert answer.code == 0, answer.err
    assert f"warning: stopped by the guards after step 8 of 12: {stopped.stopped}" in answer.err
    assert "best checkpoint, by the largest gain" in answer.out and "cast test" not in answer.out
    assert all(torch.equal(value, before[name]) for name, value in weights(stopped.output).items())


class Killed(BaseException):
    """What stands for a kill: nothing catches it."""


def test_killed_at_any_point_of_its_end_it_ends_alike(stopped, folder, monkeypatch) -> None:
    again = hacked(folder, "killed")

    def dies(module, name: str, when=lambda *_: True) -> None:
        whole = getattr(module, name)

        def call(*arguments, **options):
            if when(*arguments):
                raise Killed
            return whole(*arguments, **options)

        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(module, name, call)
            rewardsr.finetune(again, resume=True)

    dies(log.RunLog, "write", lambda _, step, line, *_rows: step == 6 and "guards" in line)  # saved, and not judged
    dies(log.RunLog, "write", lambda _, step, line, *_rows: step == 8 and "guards" in line)
    dies(ending, "_ship")
    dies(ending, "latent_offset")
    dies(ending, "write_text")
    result = rewardsr.finetune(again, resume=True)
    assert (result.step, result.stopped, result.shipped) == (8, stopped.stopped, 4)
    assert result.validation == stopped.validation
    assert_equal_runs(stopped.output, result.output)
    for name in (ENDING, "validation/step-00000004.json"):
        assert (result.output / name).read_bytes() == (stopped.output / name).read_bytes()


@pytest.mark.parametrize("rule", [{"steps": 2, "stop_when": None}, {}], ids=["finished", "stopped"])
def test_a_run_that_ended_makes_up_for_its_cast_test_once(folder, monkeypatch, rule) -> None:
    names = [f"{name}-{len(rule)}" for name in ("later", "at-once")]
    first, straight = (
        rewardsr.finetune(hacked(folder, name, **rule | {"cast_test": asked}))
        for name, asked in zip(names, (False, True), strict=True)
    )
    file = f"validation/step-{first.shipped:08d}.json"
    assert "casts" not in json.loads((first.output / file).read_text())
    later = hacked(folder, names[0], **rule | {"cast_test": True})
    assert rewardsr.finetune(later, resume=True) == first
    assert (first.output / file).read_bytes() == (straight.output / file).read_bytes()
    ours, theirs = weights(first.output), weights(straight.output)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert read_page([first.output]).evaluations[0].evaluation.cast is not None
    with monkeypatch.context() as patched:
        patched.setattr(ending, "latent_offset", None)
        patched.setattr(ending.HeldOut, "score", None)
        assert rewardsr.finetune(later, resume=True) == first, "nothing is measured again"


def test_it_goes_on_without_the_rule_and_is_then_no_stopped_run(folder, caplog) -> None:
    short = {"steps": 8, "cast_test": False}
    assert rewardsr.finetune(hacked(folder, "on", **short)).stopped
    with caplog.at_level(logging.INFO, "rewardsr"):
        result = rewardsr.finetune(hacked(folder, "on", **short | {"steps": 9, "stop_when": None}), resume=True)
    assert (result.step, result.stopped, result.shipped) == (9, None, 9)
    record = json.loads((result.output / ENDING).read_text())
    assert (record["step"], record["stopped"], record["best"]) == (9, None, None)
    last = weights(result.output / "checkpoints" / "step-00000009")
    assert all(torch.equal(value, last[name]) for name, value in weights(result.output).items())


def test_a_run_that_was_never_within_its_margins_has_nothing_to_ship(folder) -> None:
    with pytest.raises(TrainingError, match="the guards leave nothing to ship"):
        rewardsr.finetune(hacked(folder, "strict", stop_when={"in_a_row": 1}, validate_every=6))
    assert not (folder / "strict" / ENDING).exists()
