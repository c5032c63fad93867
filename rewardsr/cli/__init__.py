"""The command line. It turns options into calls and results into text; everything else lives elsewhere.

Heavy imports happen inside the commands, so that `--help` is quick.
"""

import logging
from typing import Annotated

import typer

from rewardsr import __version__, console, interrupts
from rewardsr.cli.data import data
from rewardsr.cli.evaluate import evaluate, sweep
from rewardsr.cli.exchange import export, imports
from rewardsr.cli.finetune import finetune
from rewardsr.cli.hub import pull, push, search
from rewardsr.cli.panels import HELP, Command, Group
from rewardsr.cli.report import report
from rewardsr.cli.show import adapters, captioners, degradations, demo, doctor, recipe, rewards, trainers
from rewardsr.cli.upscale import upscale

app = typer.Typer(
    name="rewardsr",
    help="Fine-tune diffusion-based image super-resolution pipelines with image-quality rewards.",
    cls=Group,
    context_settings=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

PANELS = {
    "Train": (recipe, finetune, demo),
    "Use and compare": (upscale, evaluate, sweep, report),
    "Share and convert": (push, pull, search, export),
    "See what there is": (adapters, trainers, rewards, degradations, captioners, doctor),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(cls=Command, context_settings=HELP, rich_help_panel=panel)(command)
app.add_typer(imports, name="import", rich_help_panel="Share and convert")
app.add_typer(data, name="data", rich_help_panel="Train")


def main() -> None:
    """Entry point: runs a command; the user's mistakes become one line and exit code 2, as does Ctrl-C and 130."""
    with interrupts.ending():
        console.run(app)


def _version(wanted: bool) -> None:
    if wanted:
        console.say(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    console.listen(logging.getLogger("rewardsr"))
