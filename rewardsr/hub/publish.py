"""Adapters on the Hub: publishing what a run made in one commit, fetching and finding what others published.

Everything is checked before anything is sent, and files arrive in one commit: a push that fails leaves the repository
as it was. The one thing that may stay is a repository that the push created; the error then names it.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rewardsr import __version__
from rewardsr.errors import UserError
from rewardsr.hub import connection, fetch
from rewardsr.hub.parcel import TAG, Plan, check_lora, prepare, published, write_ready
from rewardsr.run_folder import LORA, READY
from rewardsr.storage import write_folder

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        plan: what was to be sent.
        url: of the commit or pull request; None after a dry run.
        commit: its hash; None after a dry run.
        created: whether the repository is new.
        changed: False where the repository held all of it already, so that there is no new commit.
    """

    plan: Plan
    url: str | None = None
    commit: str | None = None
    created: bool = False
    changed: bool = False


@dataclass(frozen=True)
class Found:
    """An adapter on the Hub.

    Attributes:
        id: "user/name".
        base: the pipeline it is for, where its card says.
        downloads: of the last 30 days.
        likes: in all.
        updated: time of the last commit.
    """

    id: str
    base: str | None
    downloads: int
    likes: int
    updated: datetime | None


def push(
    run: Path | str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    card: str | None = None,
    say: Callable[[str], None] = print,
) -> Pushed:
    """Publish a finished run: LoRA, recipe, metrics, last validation and card, in one commit.

    Args:
        run: its folder.
        repo: "user/name"; created if need be.
        private: create it private.
        revision: branch to commit to, created if need be; main by default.
        create_pr: open a pull request against main instead of committing to it.
        dry_run: stop after the list of files; nothing is contacted.
        card: text of README.md instead of the one that is made from the run.
        say: gets the list of files, line by line.

    Raises:
        UserError: the run is not finished or damaged, the card is invalid, there is no token or connection (all is
            then ready in `run/hub` and the message has the command for later), no right to write there, the name is
            taken, or the Hub fails; the repository's branches are then as they were.
    """
    if create_pr and revision is not None:
        raise UserError("a pull request goes against main: give --create-pr or --revision, not both")
    plan = prepare(Path(run).expanduser(), repo, card, private=private, revision=revision, create_pr=create_pr)
    for line in plan.lines():
        say(line)
    if dry_run:
        return Pushed(plan)
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if token is None:
        write_ready(plan)
        raise UserError(
            f"no token for the Hub, nothing was sent; all is ready in '{plan.run / READY}': set HF_TOKEN, or log in "
            f"with hf auth login, and run: {plan.later}"
        )
    if not connection.online():
        write_ready(plan)
        raise UserError(
            "the Hub cannot be reached (or HF_HUB_OFFLINE is set), nothing was sent; all is ready in "
            f"'{plan.run / READY}': once connected, run: {plan.later}"
        )
    api = HfApi(token=token, library_name="rewardsr", library_version=__version__)
    head = _admit(api, plan)
    return _send(api, plan, head, say)


def pull(reference: str, output: Path | str | None = None) -> Path:
    """Fetch a published adapter.

    Args:
        reference: "user/name" or "user/name@revision".
        output: new or empty folder to copy it to; None leaves it in the Hub's cache.

    Returns:
        The folder, which has the layout of a run: LoRA, recipe, card and samples.

    Raises:
        UserError: as `rewardsr.hub.fetch.fetch_lora`; not a LoRA of rewardsr, or not finite; or the folder is in use.
    """
    target = None if output is None else Path(output).expanduser()
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output '{target}' is not empty: choose a new folder")
    folder = fetch.fetch_lora(reference)
    check_lora(folder / LORA, f"LoRA '{reference}'")
    if target is None:
        return folder

    def fill(copy: Path) -> None:
        there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in published(there):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy / name)  # of the cache there are only links

    write_folder(target.absolute(), fill)
    return target


def search(query: str = "", base: str | None = None, limit: int = 20) -> list[Found]:
    """Adapters on the Hub, most downloaded first.

    Args:
        query: part of the name.
        base: Hub id of the pipeline that they are for.
        limit: at most so many.

    Raises:
        UserError: no connection, or the Hub fails.
    """
    from huggingface_hub import HfApi

    if not connection.online():
        raise UserError("the Hub cannot be reached (or HF_HUB_OFFLINE is set): connect to search it")
    tags = [TAG] if base is None else [TAG, f"base_model:{base}"]
    try:
        models = HfApi().list_models(
            filter=tags,
            search=query or None,
            sort="downloads",
            limit=limit,
            expand=["tags", "downloads", "likes", "lastModified"],
        )
        return [
            Found(model.id, _base_of(model.tags or []), model.downloads or 0, model.likes or 0, model.last_modified)
            for model in models
        ]
    except Exception as error:  # no connection is requests' error or httpx's, by the version of the Hub's client
        raise UserError(f"the search failed: {connection.reason(error)}") from error


def _base_of(tags: list[str]) -> str | None:
    """The Hub's own tags are base_model:ID and base_model:KIND:ID."""
    return next((tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:")), None)


def _admit(api: "HfApi", plan: Plan) -> "ModelInfo | None":
    """Whether the token may do what is planned; nothing is changed.

    Returns:
        The repository as it is, or None where there is none yet.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with _asking(plan, "checking the token"):
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
    with _asking(plan, "looking the repository up"):
        try:
            info = api.model_info(plan.repo, timeout=connection.TIMEOUT)
        except RepositoryNotFoundError:
            for kind in ("dataset", "space"):
                if api.repo_exists(plan.repo, repo_type=kind):
                    raise UserError(f"'{plan.repo}' is a {kind} on the Hub: choose another name") from None
            info = None
    if info is None and plan.create_pr:
        raise UserError(f"there is no '{plan.repo}' to open a pull request in: push without --create-pr first")
    if info is not None and plan.private and not info.private:
        raise UserError(
            f"'{plan.repo}' exists and is public, --private is for a new one: change that at "
            f"{api.endpoint}/{plan.repo}/settings, or leave --private out"
        )
    return info


@dataclass
class _Made:
    """What a push has changed on the Hub before its commit.

    Attributes:
        doing: what it is at.
        repo: whether it created the repository.
        branch: whether it created the branch.
    """

    doing: str = "creating the repository"
    repo: bool = False
    branch: bool = False


def _send(api: "HfApi", plan: Plan, before: "ModelInfo | None", say: Callable[[str], None]) -> Pushed:
    """Create what is missing and commit; take back what can be where that fails."""
    from huggingface_hub import CommitOperationAdd

    made = _Made()
    head = None if before is None else before.sha
    try:
        if before is None:
            _create(api, plan, made)
        if plan.revision is not None:
            made.doing = f"looking for the branch '{plan.revision}'"
            head = _branch(api, plan, made) or head
        made.doing = "sending the files"
        commit = api.create_commit(
            plan.repo,
            [CommitOperationAdd(entry.name, entry.source) for entry in plan.files],
            commit_message=f"LoRA trained with rewardsr {__version__}",
            revision=plan.revision,
            create_pr=plan.create_pr,
            parent_commit=head,  # what somebody else pushes meanwhile is not overwritten
        )
    except KeyboardInterrupt:
        say(f"interrupted; {_take_back(api, plan, made)}")
        raise
    except UserError:
        raise
    except Exception as error:  # the Hub's client raises its own, those of two HTTP libraries, and Python's
        arrived, left = (None, "") if _refused(error) else _arrived(api, plan)
        if arrived is not None:
            return Pushed(plan, f"{api.endpoint}/{plan.repo}/commit/{arrived}", arrived, made.repo, arrived != head)
        left = left or _take_back(api, plan, made)
        raise UserError(
            f"push to '{plan.repo}' failed while {made.doing}: {connection.reason(error)}; {left}"
        ) from error
    return Pushed(plan, commit.pr_url or commit.commit_url, commit.oid, made.repo, commit.oid != head)


def _create(api: "HfApi", plan: Plan, made: _Made) -> None:
    try:
        api.create_repo(plan.repo, private=plan.private)
    except Exception as error:
        # Where no answer came, the Hub may have done it all the same.
        made.repo = not _refused(error) and _exists(api, plan)
        raise
    made.repo = True


def _exists(api: "HfApi", plan: Plan) -> bool:
    try:
        return bool(api.repo_exists(plan.repo))
    except Exception:  # then it is better to name one that does not exist than not to name one that does
        return True


def _branch(api: "HfApi", plan: Plan, made: _Made) -> str | None:
    """The commit that the branch is at, which is created where there is none; None where that is main's."""
    assert plan.revision is not None
    refs = api.list_repo_refs(plan.repo, include_pull_requests=True)
    for ref in [*refs.branches, *(refs.pull_requests or [])]:
        if plan.revision in (ref.name, ref.ref):
            return ref.target_commit
    if any(plan.revision == tag.name for tag in refs.tags):
        raise UserError(f"'{plan.revision}' is a tag of '{plan.repo}': give a branch as --revision")
    try:
        api.create_branch(plan.repo, branch=plan.revision)
    except Exception as error:
        made.branch = not _refused(error)  # as in `_create`
        raise
    made.branch = True
    return None


def _take_back(api: "HfApi", plan: Plan, made: _Made) -> str:
    """Remove a branch that the push made, and say in what state the repository is left."""
    if made.repo:
        return (
            f"'{plan.repo}' was created by this push and holds nothing of the run: push again, or delete it at "
            f"{api.endpoint}/{plan.repo}/settings"
        )
    if made.branch and plan.revision is not None:
        try:
            api.delete_branch(plan.repo, branch=plan.revision)
        except Exception as error:
            if connection.status_of(error) != 404:
                return f"'{plan.repo}' is as it was but for the branch '{plan.revision}', which this push made"
    return f"'{plan.repo}' is as it was"


def _refused(error: BaseException) -> bool:
    """Whether the Hub said no; otherwise it may have done what it was asked, and only its answer was lost."""
    return 400 <= (connection.status_of(error) or 0) < 500


def _arrived(api: "HfApi", plan: Plan) -> tuple[str | None, str]:
    """Whether the repository holds all files although no answer came.

    Returns:
        The commit they are at, if they are there; and what to tell where that cannot be seen.
    """
    if plan.create_pr:
        return None, f"whether the pull request was opened is to be seen at {api.endpoint}/{plan.repo}/discussions"
    try:
        info = api.model_info(plan.repo, revision=plan.revision, files_metadata=True, timeout=connection.TIMEOUT)
    except Exception as error:
        if _refused(error):  # no such repository or branch
            return None, ""
        return None, f"whether the files arrived cannot be seen now: look at {api.endpoint}/{plan.repo}/commits"
    there = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in info.siblings or []}
    return (info.sha if all(there.get(entry.name) in entry.hashes() for entry in plan.files) else None), ""


@contextmanager
def _asking(plan: Plan, doing: str) -> Iterator[None]:
    """Around requests that change nothing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # as in `_send`
        raise UserError(
            f"push to '{plan.repo}' failed while {doing}: {connection.reason(error)}; nothing was sent"
        ) from error
