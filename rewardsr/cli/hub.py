"""`rewardsr push`, `pull` and `search`: the Hugging Face Hub."""

from pathlib import Path
from typing import Annotated

import typer

from rewardsr import console
from rewardsr.errors import printable


def push(
    run: Annotated[Path, typer.Argument(help="folder of a finished run")],
    repo: Annotated[str, typer.Argument(help="user/name on the Hub; created if need be")],
    private: Annotated[bool, typer.Option("--private", help="a new repository becomes private")] = False,
    revision: Annotated[str | None, typer.Option(help="branch to commit to; main by default")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="open a pull request instead")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the files and stop")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the base, for the card of a local one")] = None,
    dataset: Annotated[list[str] | None, typer.Option(help="Hub id of a dataset that was trained on")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="of the base, where its card is not here")] = None,
    keep_paths: Annotated[
        bool, typer.Option("--keep-paths", help="publish paths of this machine whole, not their last part alone")
    ] = False,
) -> None:
    """Publish a run on the Hugging Face Hub: LoRA, recipe, metrics, pictures and card, in one commit."""
    from rewardsr.hub.publish import push as publish

    pushed = publish(
        run,
        repo,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        base_model=base_model,
        datasets=dataset or [],
        licence=licence,
        keep_paths=keep_paths,
    )
    console.say("nothing was sent" if pushed.url is None else pushed.url)


def pull(
    reference: Annotated[str, typer.Argument(help="user/name or user/name@revision")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="new folder; else the Hub's cache")] = None,
) -> None:
    """Fetch an adapter from the Hub; --run and --lora take the same reference."""
    from rewardsr.hub.fetch import pull as fetch

    console.say(fetch(reference, output))


def search(
    query: Annotated[str, typer.Argument(help="words in the name")] = "",
    base: Annotated[str | None, typer.Option(help="only adapters for this base model")] = None,
    limit: Annotated[int, typer.Option(min=1, help="at most so many")] = 20,
) -> None:
    """List adapters on the Hub."""
    from rewardsr.hub.search import search as find

    for found in find(query, base, limit):
        line = f"{found.id:<48} {found.downloads:>8} downloads {found.likes:>5} likes  {found.base or ''}"
        console.say(printable(line))
