"""`rewardsr report`: what runs and evaluations found, as one page."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of runs, or of evaluations; also several, of one base"),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="the page; by default report.html in the folder of a single run"),
    ] = None,
    title: Annotated[str | None, typer.Option(help="heading; by default the names of the runs")] = None,
    megabytes: Annotated[
        float, typer.Option(min=0.1, help="that the pictures may take; beyond that they are compressed, then left out")
    ] = 4,
    plots: Annotated[
        Path | None, typer.Option(help="also write the curves as PNGs to this new folder (needs matplotlib)")
    ] = None,
) -> None:
    """Write report.html: verdict, pictures with a slider, scores of every image, curves, recipe; in one file.

    Several runs (seeds, a control with shuffled advantages, one that hacks its reward) share one page: their curves lie
    over each other, their pictures are compared, and gains are held against those of the control.
    """
    from rewardsr.errors import UserError
    from rewardsr.evaluation.page import check_place, read_page, write_page
    from rewardsr.evaluation.page.plots import check_plots, write_plots
    from rewardsr.run_folder import REPORT
    from rewardsr.storage import expand

    places = [expand(run) for run in runs]
    if output is None and (len(places) > 1 or places[0].is_file()):
        raise UserError("several runs, or a file, have no folder for their page: name it, --output report.html")
    path = places[0] / REPORT if output is None else expand(output)
    check_place(path)
    if plots is not None:
        plots = expand(plots)
        check_plots(plots)
    page = read_page(places, title)
    console.say(write_page(path, page, int(1e6 * megabytes)))
    if plots is not None:
        write_plots(plots, page.runs)
        console.say(plots)
