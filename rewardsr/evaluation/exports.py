"""An evaluation for spreadsheets and papers: CSV with every score, a Markdown page, and a LaTeX table of the means."""

import csv
import io

from rewardsr.evaluation.comparison import signed, unsigned
from rewardsr.evaluation.report import Evaluation, groups, markdown, markdown_table, mean_of

_SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


def as_csv(evaluation: Evaluation) -> str:
    """A row for each image and system, a column for each metric, in the metric's own sign."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["image", "system", *evaluation.metrics])
    for place, image in enumerate(evaluation.images):
        for system, scores in evaluation.scores.items():
            values = (evaluation.shown(metric) * scores[metric][place] for metric in evaluation.metrics)
            writer.writerow([image, system, *map(repr, values)])
    return buffer.getvalue()


def as_markdown(evaluation: Evaluation) -> str:
    """The tables of `markdown`, and for each system that is compared the ten images that lost most by every metric."""
    lines = [markdown(evaluation)]
    for system in evaluation.compared:
        lines += [f"Worst images of {system} against {evaluation.first}:", ""]
        table: list[tuple[str, ...]] = [("metric", "image", "difference")]
        for metric in evaluation.metrics:
            sign = evaluation.shown(metric)
            for place, (image, lost) in enumerate(evaluation.worst(metric, system=system)):
                table.append(("" if place else metric, image, signed(sign * lost)))
        lines += [*markdown_table(table), ""]
    return "\n".join(lines)


def worst_in_words(evaluation: Evaluation) -> list[str]:
    """For each system that is compared a line of the ten images that lost most by the first metric held out."""
    metric = next(name for _, metrics in reversed(groups(evaluation)) for name in metrics if name in evaluation.metrics)
    sign, lines = evaluation.shown(metric), []
    for system in evaluation.compared:
        worst = evaluation.worst(metric, system=system)
        lines.append(
            f"worst images of {system} by {metric}: "
            + ", ".join(f"{image} {signed(sign * difference)}" for image, difference in worst)
        )
    return lines


def as_latex(evaluation: Evaluation) -> str:
    """A table for a paper: a row for each system, a column for each metric, the best of each in bold.

    It needs the package booktabs. Arrows say which way is better; metrics that a system was trained on and those held
    out stand below headings of their own.
    """
    sections = groups(evaluation)
    names = [metric for _, metrics in sections for metric in metrics]
    ways = {name: "downarrow" if name in evaluation.negated else "uparrow" for name in names}
    arrows = [rf"{_escaped(name)} $\{way}$" for name, way in ways.items()]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(names)}}}", r"\toprule"]
    if len(sections) > 1:
        first, second = ((title, len(metrics)) for title, metrics in sections)
        spans = (rf"\multicolumn{{{count}}}{{c}}{{{title}}}" for title, count in (first, second))
        lines.append(rf" & {' & '.join(spans)} \\")
        lines.append(rf"\cmidrule(lr){{2-{1 + first[1]}}}\cmidrule(lr){{{2 + first[1]}-{1 + len(names)}}}")
    lines += [rf"System & {' & '.join(arrows)} \\", r"\midrule"]
    columns = [{system: mean_of(evaluation, system, name) for system in evaluation.scores} for name in names]
    for system in evaluation.scores:
        cells = []
        for name, column in zip(names, columns, strict=True):
            best = (min if name in evaluation.negated else max)(column.values())
            value = unsigned(column[system])
            cells.append(rf"\textbf{{{value}}}" if column[system] == best and len(column) > 1 else value)
        lines.append(rf"{_escaped(system)} & {' & '.join(cells)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(name: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in name)
