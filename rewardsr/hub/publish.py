"""Publishing what a run made on the Hub, in one commit.

Everything is checked before anything is sent, and the Hub takes a commit whole or not at all: a push that fails
changes no branch. What it may leave is a repository or a branch that it created for the commit; the error says so.
"""

import io
import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import (
    HFValidationError,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    validate_repo_id,
)
from huggingface_hub.utils import tqdm as hub_bar

from rewardsr import __version__, progress
from rewardsr.errors import UserError
from rewardsr.hub.card import build_card, check_card
from rewardsr.hub.connection import TIMEOUT, online, reason, status_of
from rewardsr.hub.content import Shortened, read_run
from rewardsr.hub.fetch import split_reference
from rewardsr.interrupts import keeping
from rewardsr.run_folder import CARD, READY
from rewardsr.storage import expand, write_bytes, write_folder

_log = logging.getLogger("rewardsr")


@dataclass(frozen=True)
class Plan:
    """What a push is going to do.

    Attributes:
        run: folder of the run.
        repo: "user/name".
        files: what the repository will hold of it: content by name.
        shortened: paths of this machine in them, and what is published of each.
        private: whether a repository that has to be created becomes private.
        revision: branch to commit to; None is main.
        create_pr: open a pull request instead.
    """

    run: Path
    repo: str
    files: Mapping[str, bytes] = field(repr=False)
    shortened: Sequence[Shortened] = ()
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def lines(self) -> Iterator[str]:
        """The plan for people to read."""
        where = " as a pull request" if self.create_pr else f", branch {self.revision}" if self.revision else ""
        yield f"{len(self.files)} files for '{self.repo}'{where}:"
        for name, content in self.files.items():
            yield f"  {len(content):>12,d} bytes  {name}"
        if self.shortened:
            yield "paths of this machine, of which only the last part is published (--keep-paths: all of it):"
        for file, where, before, after in self.shortened:
            yield f"  {file}, {where}: {before} -> {after}"

    @property
    def later(self) -> str:
        """The command that uploads the ready folder, with nothing but the Hub's own client."""
        options = ["--private"] * self.private + ["--create-pr"] * self.create_pr
        options += ["--revision", self.revision] if self.revision else []
        return shlex.join(["hf", "upload", self.repo, str(self.run / READY), ".", *options])


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        plan: what was to be sent.
        url: of the commit or pull request; None after a dry run.
        commit: its hash, or that of the branch's last commit where the branch held all of it already; None after a
            dry run.
    """

    plan: Plan
    url: str | None = None
    commit: str | None = None


def push(
    run: Path | str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    licence: str | None = None,
    card: str | None = None,
    keep_paths: bool = False,
) -> Pushed:
    """Publish a finished run: LoRA, recipe, metrics, last validation and card, in one commit.

    Args:
        run: its folder.
        repo: "user/name"; created if need be.
        private: create it private.
        revision: branch to commit to, created if need be; main by default.
        create_pr: open a pull request against main instead of committing to it.
        dry_run: stop after the list of files; nothing is sent.
        base_model, datasets, licence: for the card, as in `rewardsr.hub.card.build_card`.
        card: text of README.md instead of the one that is made from the run; it is published as it is.
        keep_paths: publish paths of this machine as they are, not their last parts alone.

    Raises:
        UserError: the run is not finished or damaged, the card is invalid, there is no token or connection (all is
            then ready in `run/hub` and the message has the command for later), no right to write there, the name is
            taken, or the Hub fails; the repository's branches are then as they were.
    """
    if create_pr and revision is not None:
        raise UserError("a pull request goes against main: give --create-pr or --revision, not both")
    if card is not None and (base_model or datasets or licence):
        raise UserError("base_model, datasets and licence are for the card that is made: give them or card, not both")
    run = expand(run)
    _check_name(repo)
    files, shortened = read_run(run, keep_paths)
    if card is None:
        card = build_card(run, repo, base_model, datasets, licence, keep_paths)
    check_card(card, files)
    plan = Plan(run, repo, {CARD: card.encode(), **files}, tuple(shortened), private, revision, create_pr)
    for line in plan.lines():
        _log.info(line)
    if dry_run:
        return Pushed(plan)
    token = get_token()
    if token is None or not online():
        write_folder(run / READY, lambda folder: _write(folder, plan.files), replace=True)
        why, then = "the Hub cannot be reached (or HF_HUB_OFFLINE is set)", "once connected"
        if token is None:
            why, then = "no token for the Hub", "set HF_TOKEN, or log in with hf auth login"
        raise UserError(f"{why}, nothing was sent; all is ready in '{run / READY}': {then}, and run: {plan.later}")
    api = HfApi(token=token, library_name="rewardsr", library_version=__version__)
    return _send(api, plan, _check_rights(api, plan))


def _check_name(repo: str) -> None:
    """Refuse what cannot be a repository's name.

    Raises:
        UserError: it cannot.
    """
    if split_reference(repo)[1] is not None:
        raise UserError(f"'{repo}': give the branch as --revision")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' cannot be a repository's name: {' '.join(str(error).split())}") from error


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        write_bytes(folder / name, content)


def _check_rights(api: HfApi, plan: Plan) -> ModelInfo | None:
    """Whether the token may do what is planned; nothing is changed.

    Returns:
        The repository as it is, or None where there is none yet.
    """
    with _explained(plan, "checking the token"):
        who = api.whoami()
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"the token of '{who['name']}' can only read: make one with write access at {api.endpoint}/settings/tokens"
        )
    names = [who["name"], *(org["name"] for org in who.get("orgs", []) if org.get("roleInOrg") != "read")]
    if plan.repo.split("/")[0].lower() not in [name.lower() for name in names] and not plan.create_pr:
        raise UserError(
            f"'{plan.repo}' is not yours to write to: the token is for {', '.join(names)}; "
            "push there, or propose it with --create-pr"
        )
    info: ModelInfo | None = None
    with _explained(plan, "looking the repository up"):
        try:
            info = api.model_info(plan.repo, timeout=TIMEOUT)
        except RepositoryNotFoundError:
            for kind in ("dataset", "space"):
                if api.repo_exists(plan.repo, repo_type=kind):
                    raise UserError(f"'{plan.repo}' is a {kind} on the Hub: choose another name") from None
    if info is None and plan.create_pr:
        raise UserError(f"there is no '{plan.repo}' to open a pull request in: push without --create-pr first")
    if info is not None and plan.private and not info.private:
        raise UserError(
            f"'{plan.repo}' exists and is public, --private is for a new one: change that at "
            f"{api.endpoint}/{plan.repo}/settings, or leave --private out"
        )
    return info


def _send(api: HfApi, plan: Plan, info: ModelInfo | None) -> Pushed:
    """Create what is missing, and commit."""
    head, created = None if info is None else info.sha, ""
    if info is None:
        with _explained(plan, "creating the repository"):
            api.create_repo(plan.repo, private=plan.private)
        created = f"; it created the repository ({api.endpoint}/{plan.repo}/settings)"
    if plan.revision is not None:
        with _explained(plan, f"looking for the branch '{plan.revision}'", created):
            refs = api.list_repo_refs(plan.repo, include_pull_requests=True)
        branches = [*refs.branches, *(refs.pull_requests or [])]
        branch = next((ref for ref in branches if plan.revision in (ref.name, ref.ref)), None)
        if branch is not None:
            head = branch.target_commit
        elif any(plan.revision == tag.name for tag in refs.tags):
            raise UserError(f"'{plan.revision}' is a tag of '{plan.repo}': give a branch as --revision")
        else:
            with _explained(plan, f"creating the branch '{plan.revision}'", created):
                api.create_branch(plan.repo, branch=plan.revision)
            created += f"; it created the branch '{plan.revision}'"
    size = sum(map(len, plan.files.values()))
    left = keeping("this push left every branch as it was, or sent everything: push again")
    sending = progress.bar(f"sending to {plan.repo}", size, unit="B")
    with _explained(plan, "sending the files", created), left, sending as advance, _by_xet(advance):
        commit = api.create_commit(
            plan.repo,
            [_Counted(name, content, advance) for name, content in plan.files.items()],
            commit_message=f"LoRA trained with rewardsr {__version__}",
            revision=plan.revision,
            create_pr=plan.create_pr,
            parent_commit=head,  # what somebody else pushes meanwhile is not overwritten
        )
    return Pushed(plan, commit.pr_url or commit.commit_url, commit.oid)


class _Counted(CommitOperationAdd):
    """A file whose bytes are counted as the Hub's client reads them to send them over HTTP."""

    def __init__(self, name: str, content: bytes, advance: Callable[[int], object]) -> None:
        super().__init__(name, content)
        self._content, self._advance, self._reached = content, advance, 0

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """What the client reads."""
        yield _Reader(self._content, self._count)

    def _count(self, place: int) -> None:
        # It reads again what it compares with the Hub's file first, or sends once more after a failure.
        more = max(0, place - self._reached)
        self._reached += more
        self._advance(more)


class _Reader(io.BytesIO):
    """Tells `reached` after each reading up to which byte there has been one."""

    def __init__(self, content: bytes, reached: Callable[[int], object]) -> None:
        super().__init__(content)
        self._tell_of = reached

    def read(self, size: int | None = -1) -> bytes:
        """As any file."""
        found = super().read(size)
        self._tell_of(self.tell())
        return found


@contextmanager
def _by_xet(advance: Callable[[int], object]) -> Iterator[None]:
    """Count what goes to the Hub's newer storage, Xet. That takes the content as it is, and only says how much of it is
    stored to bars that the client makes itself: inside, these show nothing and are read. With
    HF_HUB_DISABLE_PROGRESS_BARS=1 there are none."""
    begin, display, reached = hub_bar.__init__, hub_bar.display, 0

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs | {"file": io.StringIO(), "mininterval": 0})

    def read(self: Any, *_: Any, **__: Any) -> bool:
        nonlocal reached
        if self.unit == "B":  # one of all content, one of what is new of it, and one a file; others count files
            more = max(0, int(self.n) - reached)
            reached += more
            advance(more)
        return True

    # Another library may have switched them off; what the user sets goes first.
    off = are_progress_bars_disabled() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None
    if off:
        enable_progress_bars()
    for name, method in (("__init__", silent), ("display", read)):
        setattr(hub_bar, name, method)
    try:
        yield
    finally:
        if off:
            disable_progress_bars()
        for name, method in (("__init__", begin), ("display", display)):
            setattr(hub_bar, name, method)


@contextmanager
def _explained(plan: Plan, doing: str, created: str = "") -> Iterator[None]:
    """Turns what fails inside into one line that says in what state the repository is left."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises its own, those of two HTTP libraries, and Python's
        left = "this push left every branch as it was"
        if doing == "sending the files" and not 400 <= (status_of(error) or 0) < 500:
            left += ", or sent everything if only the answer was lost: push again"
        raise UserError(f"push to '{plan.repo}' failed while {doing}: {reason(error)}; {left}{created}") from error
