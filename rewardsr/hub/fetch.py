"""Where weights come from: a local folder, or a repository of the Hugging Face Hub."""

import glob
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rewardsr.demo import PIPELINE
from rewardsr.errors import UserError
from rewardsr.hub.connection import TIMEOUT, online, reason, status_of
from rewardsr.run_folder import LORA

EMBEDDED = "embedded"

_WEIGHTS = (".safetensors", ".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")  # ends of files, not of repositories
_REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")


def is_reference(text: str) -> bool:
    """Whether this names a Hub repository, user/name or user/name@revision, rather than something on the disk."""
    found = _REFERENCE.fullmatch(text)
    return found is not None and not found["repo"].endswith(_WEIGHTS) and not Path(text).exists()


def split_reference(text: str) -> tuple[str, str | None]:
    """Repository and revision of "user/name" or "user/name@revision".

    Raises:
        UserError: it is neither.
    """
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise UserError(f"'{text}' is not a Hub id of the form user/name or user/name@revision")
    return found["repo"], found["revision"]


def fetch(source: str, what: str, folders: tuple[str, ...], revision: str | None = None) -> tuple[Path, str]:
    """A local folder with the named parts of a diffusers repository.

    Args:
        source: path of a folder, a Hub id ("user/name"), or "embedded" for the small pipeline that comes along.
        what: what is being fetched, for messages ("base").
        folders: sub-folders that are needed; configuration and safetensors of these are downloaded.
        revision: branch, tag or commit of a Hub repository.

    Returns:
        The folder and the revision it is at ("local", or the commit).

    Raises:
        UserError: no such folder or repository, or it is not in the cache and there is no connection.
    """
    if source == EMBEDDED:
        return PIPELINE, EMBEDDED
    local = Path(source).expanduser()
    if local.is_dir():
        return local, "local"
    if local.exists():
        raise UserError(f"{what} '{source}' is a file: give the folder of a diffusers pipeline, or a Hub id")
    if source.count("/") != 1 or source[:1] in "./~" or source.endswith("/"):
        raise UserError(f"{what} '{source}': no such folder, and not a Hub id of the form user/name")
    patterns = ["model_index.json"]
    for folder in folders:
        patterns += [f"{folder}/*.json", f"{folder}/*.txt", f"{folder}/*.safetensors"]
    with _explained(what, source, revision):
        path = _download(source, revision, patterns, ["*.fp16.*"], cached=not online())
    return path, path.name


def card_of(source: str, revision: str | None = None) -> str | None:
    """Text of a pipeline's own card, its README.md; None where it has none, or where it cannot be had now.

    Args:
        source: as for `fetch`.
        revision: what `fetch` returned as such.
    """
    folder = PIPELINE if source == EMBEDDED else Path(source).expanduser()
    if folder.is_dir():
        card = folder / "README.md"
        return card.read_text(errors="replace") if card.is_file() else None
    from huggingface_hub import hf_hub_download

    for cached in (True, False) if online() else (True,):
        with suppress(Exception):  # a name that is no repository, no such file, no connection: all the same here
            path = hf_hub_download(source, "README.md", revision=revision, local_files_only=cached)
            return Path(path).read_text(errors="replace")
    return None


def fetch_lora(reference: str, subfolder: str | None = None) -> Path:
    """A local folder with what a repository holds of a published run: LoRA, recipe, card and samples.

    They come from the Hub's cache where they are there already, and from nowhere else without a connection.

    Args:
        reference: "user/name" or "user/name@revision" (branch, tag or commit).
        subfolder: where in the repository the LoRA lies, if not at its top.

    Raises:
        UserError: no such repository or revision, no connection and nothing in the cache, no LoRA there, a file name
            that leads out of its folder, or a damaged file.
    """
    from rewardsr.hub.parcel import leads_out
    from rewardsr.weights import read_safetensors

    repo, revision = split_reference(reference)
    what, inside = f"LoRA '{reference}'", "" if subfolder is None else f"{subfolder}/"
    if leads_out(inside + LORA):
        raise UserError(f"{what}: subfolder '{subfolder}' leads out of the repository")
    with _explained("LoRA", repo, revision):
        folder = _download_run(repo, revision, inside, what) / inside
    path = folder / LORA
    if not path.is_file():
        raise UserError(f"{what}: its {LORA} is not in the Hub's cache, and the Hub cannot be reached: connect once")
    _check_sum(path, what)
    try:
        read_safetensors(path)
    except UserError as error:
        raise UserError(f"{what}: its {LORA} is damaged or not a safetensors file") from error
    return folder


@contextmanager
def _explained(what: str, source: str, revision: str | None) -> Iterator[None]:
    """Turns what can go wrong while `source` is fetched into one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{what} '{source}' is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} '{source}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what} '{source}' is not on the Hub or not visible to you: check the name, try a mirror, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        if status_of(error) is not None:
            raise UserError(f"{what} '{source}' is not in the Hub's cache: {reason(error)}") from error
        raise UserError(
            f"{what} '{source}' is neither a folder here nor in the Hub's cache, and the Hub cannot be reached: "
            "give a local folder, or connect once"
        ) from error
    except Exception as error:  # no connection is requests' error or httpx's, by the version of the Hub's client
        raise UserError(f"{what} '{source}': download failed: {reason(error)}") from error


def _download(repo: str, revision: str | None, patterns: list[str], ignored: list[str], cached: bool) -> Path:
    from huggingface_hub import snapshot_download

    path = snapshot_download(
        repo, revision=revision, allow_patterns=patterns, ignore_patterns=ignored, local_files_only=cached
    )
    return Path(path)


def _download_run(repo: str, revision: str | None, inside: str, what: str) -> Path:
    """The files of a published run, once the repository's list of names has been looked at; or from the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    from rewardsr.hub import parcel

    trouble: Exception | None = None
    if online():
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT)
            names = parcel.chosen([file.rfilename for file in info.siblings or []], inside, what)
            return _download(repo, revision, [glob.escape(name) for name in names], [], cached=False)
        except Exception as error:
            status = status_of(error)
            if isinstance(error, UserError) or (status is not None and status < 500):
                raise
            trouble = error
    wanted = [glob.escape(inside) + pattern for pattern in parcel.PATTERNS]
    try:
        folder = _download(repo, revision, wanted, [], cached=True)
        if trouble is None or (folder / inside / parcel.LORA).is_file():  # else a download broke off before it
            return folder
    except LocalEntryNotFoundError as error:
        trouble = trouble or error
    raise trouble


def _check_sum(path: Path, what: str) -> None:
    """Large files lie in the cache under their own SHA-256: refuse one that is not what was uploaded."""
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name) and hashlib.sha256(blob.read_bytes()).hexdigest() != blob.name:
        with suppress(OSError):  # or it would be taken for the right one again
            path.unlink()
            blob.unlink()
        raise UserError(
            f"{what}: {path.name} was damaged on its way or in the cache, and has been dropped: fetch it again"
        )
