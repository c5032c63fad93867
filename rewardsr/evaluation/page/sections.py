"""The parts of a page that need no script, as HTML: verdict, cast test, recipes. Everything in them is escaped."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rewardsr.evaluation.comparison import Comparison
from rewardsr.evaluation.page.content import EvaluationView, Page, RunView
from rewardsr.evaluation.page.verdict import Verdict, change, direction, number, within
from rewardsr.evaluation.report import summary

MARKS = {1: ("up", "▲", "better"), -1: ("down", "▼", "worse"), 0: ("even", "●", "not settled")}
SMALL = ("even", "▽", "worse, within its margin")


def verdict_section(page: Page, verdicts: Sequence[Verdict]) -> str:
    """A card a system, and the table of all changes with their intervals."""
    if not verdicts:
        return '<p class="quiet">No evaluation or validation: nothing says whether it got better.</p>'
    cards = "".join(_card(page, verdict) for verdict in verdicts)
    return f'<div class="cards">{cards}</div>{_table(page, verdicts)}'


def _card(page: Page, verdict: Verdict) -> str:
    pictured = any(picture.name == verdict.worst for picture in page.pictures)
    worst = escape(verdict.worst)
    link = f'<button type="button" class="link" data-picture="{worst}">{worst}</button>' if pictured else worst
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in verdict.sentences)
    return (
        f'<article class="card {verdict.tone}"><h3>{escape(verdict.name)}</h3>'
        f'<p class="headline">{escape(verdict.headline)}</p>{said}'
        f"<p>Least {escape(verdict.lead)} gained on {link}.</p></article>"
    )


def _table(page: Page, verdicts: Sequence[Verdict]) -> str:
    views = page.evaluations
    names = list(dict.fromkeys(name for view in views for name in view.evaluation.rewards))
    head = "".join(f'<th scope="col">{escape(verdict.name)}</th>' for verdict in verdicts)
    rows = []
    for name in names:
        found = [view.evaluation.rewards.get(name) for view in views]
        reach = max((abs(end) for one in found if one is not None for end in _ends(one)), default=0.0)
        cells = "".join(
            '<td class="quiet">no score</td>' if one is None else _cell(one, view.evaluation.margins.get(name), reach)
            for one, view in zip(found, views, strict=True)
        )
        rewarded = any(name in run.rewards for run in map(page.run_of, views) if run is not None)
        kind = ' <span class="tag">reward</span>' if rewarded else ""
        rows.append(f'<tr><th scope="row">{escape(name)}{kind}</th>{cells}</tr>')
    firsts = dict.fromkeys(view.evaluation.first for view in views)
    against = " or ".join("the base" if first == "base" else first for first in firsts)
    said = "; ".join(dict.fromkeys(summary(view.evaluation) for view in views))
    rewards = " <b>Reward</b>: trained on; the others only watch." if any(run.rewards for run in page.runs) else ""
    guarded = any(view.evaluation.margins for view in views)
    margins = " <b>Margin</b>: a mean that falls by no more does not count as worse." if guarded else ""
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Changes with intervals"><table class="verdict">'
        f"<caption>Change against {escape(against)}. {escape(said[:1].upper() + said[1:])}.{rewards}{margins}</caption>"
        f'<thead><tr><th scope="col">metric</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _ends(comparison: Comparison) -> tuple[float, ...]:
    ends = (comparison.difference, comparison.low, comparison.high)
    return tuple(end for end in ends if math.isfinite(end))


def _cell(comparison: Comparison, margin: float | None, reach: float) -> str:
    """Change, interval (as text and drawn), means, images and margin of one metric and system."""
    way, small = direction(comparison), within(comparison, margin)
    kind, mark, words = SMALL if small else MARKS[way]
    better, count = sum(one > 0 for one in comparison.differences), len(comparison.base)
    gain, _, interval = change(comparison).partition(" ")
    means = f"{number(comparison.base_mean, False)} → {number(comparison.tuned_mean, False)}"
    held = f" · {'within' if small else 'beyond'} its margin of {margin:g}" if way < 0 and margin is not None else ""
    return (
        f'<td class="{kind}"><span class="gain"><span aria-hidden="true">{mark}</span> {gain}</span>'
        f'<span class="hidden"> ({words})</span> <span class="interval">{interval}</span>{_whisker(comparison, reach)}'
        f'<span class="quiet">{means} · {better}/{count} up{held}</span></td>'
    )


def _whisker(comparison: Comparison, reach: float) -> str:
    """The interval on an axis with 0 in the middle, which all systems of a metric share."""

    def x(value: float) -> str:
        return f"{50 + 46 * value / reach if reach else 50:.1f}"

    bar = ""
    if math.isfinite(comparison.low):
        bar = f'<line class="bar" x1="{x(comparison.low)}" x2="{x(comparison.high)}" y1="5" y2="5"/>'
    return (
        '<svg class="whisker" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<line class="zero" x1="50" x2="50" y1="0" y2="10"/>{bar}'
        f'<line class="dot" x1="{x(comparison.difference)}" x2="{x(comparison.difference)}" y1="1" y2="9"/></svg>'
    )


def cast_section(page: Page) -> str:
    """The cast test of each evaluation that has one; empty where none has."""
    parts = [_cast(view) for view in page.evaluations if view.evaluation.cast is not None]
    if not parts:
        return ""
    return (
        '<section id="cast" aria-labelledby="cast-heading"><h2 id="cast-heading">Cast test</h2>'
        "<p>How much of a gain does one constant offset of the latents give, the same for every image and without the "
        "LoRA? Above a half, what was learnt is mostly a global cast, not something of images.</p>"
        f"{''.join(parts)}</section>"
    )


def _cast(view: EvaluationView) -> str:
    cast = view.evaluation.cast
    assert cast is not None
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{change(test.gain)}</td><td>{change(test.alone)}</td>'
        f"<td>{test.share_in_words if test.gain.low > 0 else '–'}</td><td>{change(test.without)}</td></tr>"
        for name, test in cast.rewards.items()
    )
    head = "".join(
        f'<th scope="col">{text}</th>' for text in ("metric", "gain", "offset alone", "its share", "without it")
    )
    return (
        f"<h3>{escape(view.name)}</h3>{''.join(f'<p>{escape(text)}.</p>' for text in cast.sentences)}"
        f'<div class="scroll" role="region" tabindex="0" aria-label="Cast test of {escape(view.name)}"><table>'
        f"<caption>Offset of {len(cast.offset)} numbers, measured on {escape(cast.measured_on)}; intervals of 95 % "
        f"over images.</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def runs_section(page: Page) -> str:
    """What differs between the runs, and recipe and versions of each; empty where there are none."""
    if not page.runs:
        return ""
    parts = "".join(_run(run) for run in page.runs)
    return (
        '<section id="recipe" aria-labelledby="recipe-heading"><h2 id="recipe-heading">Recipe and versions</h2>'
        f"{_differences(page.runs)}{parts}</section>"
    )


def _run(run: RunView) -> str:
    notes = "".join(f"<p>{escape(note)}</p>" for note in run.notes)
    versions = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in run.versions.items())
    return (
        f"<details><summary>{escape(run.name)}</summary>{notes}{f'<dl>{versions}</dl>' if versions else ''}"
        f'<pre tabindex="0" aria-label="Recipe of {escape(run.name)}">{escape(run.recipe_text)}</pre></details>'
    )


def _differences(runs: Sequence[RunView]) -> str:
    """A table of the settings that are not the same in all runs."""
    settings = [dict(_flat(run.recipe)) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in settings for key in one) if len({*_all(settings, key)}) > 1]
    if len(runs) < 2 or not keys:
        return ""
    head = "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    rows = ""
    for key in keys:
        cells = "".join(f"<td>{escape(value)}</td>" for value in _all(settings, key))
        rows += f'<tr><th scope="row">{escape(key)}</th>{cells}</tr>'
    return (
        '<div class="scroll" role="region" tabindex="0" aria-label="Settings that differ"><table>'
        f'<caption>Settings that differ</caption><thead><tr><th scope="col">key</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _all(settings: Sequence[Mapping[str, str]], key: str) -> list[str]:
    return [one.get(key, "–") for one in settings]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from _flat(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(entry, ensure_ascii=False, default=str)
