"""Where weights come from: a local folder, or a repository of the Hugging Face Hub."""

import glob
import hashlib
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies, proxy_bypass

from rewardsr.demo import PIPELINE
from rewardsr.errors import UserError

EMBEDDED = "embedded"

_WEIGHTS = (".safetensors", ".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")  # ends of files, not of repositories
TIMEOUT = 10.0  # seconds for the answer to a short question; the Hub's client would wait for ever
_ON = {"1", "ON", "YES", "TRUE"}
_REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")
_MEANINGS = {
    401: "the Hub does not accept the token",
    403: "the Hub forbids it to this token",
    404: "there is no such thing on the Hub",
    409: "it is in conflict with what is there",
    412: "something else was pushed in the meantime",
    429: "too many requests, try later",
}


def endpoint() -> str:
    """Address of the Hub: HF_ENDPOINT, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


@cache
def online(timeout: float = 3.0) -> bool:
    """Whether the Hub's host answers; asked once a process.

    The Hub's client retries for half a minute without a connection, so this is asked first. HF_HUB_OFFLINE and
    HF_ENDPOINT are honoured; behind a proxy the proxy's host is tried.

    Args:
        timeout: seconds to wait for the connection.
    """
    if (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _ON:
        return False
    parts = urlparse(endpoint())
    proxy = getproxies().get(parts.scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(parts.hostname or ""):
        parts = urlparse(proxy if "//" in proxy else f"//{proxy}")
    port = parts.port or (80 if parts.scheme == "http" else 443)
    answered: list[bool] = []

    def connect() -> None:
        with suppress(OSError), socket.create_connection((parts.hostname or "", port), timeout=timeout):
            answered.append(True)

    # In a thread, because looking up the name may take far longer than `timeout` and knows none of its own.
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(timeout)
    return bool(answered)


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
    from rewardsr.files import read_safetensors
    from rewardsr.lora import FILE_NAME
    from rewardsr.parcel import leads_out

    repo, revision = split_reference(reference)
    what, inside = f"LoRA '{reference}'", "" if subfolder is None else f"{subfolder}/"
    if leads_out(inside + FILE_NAME):
        raise UserError(f"{what}: subfolder '{subfolder}' leads out of the repository")
    with _explained("LoRA", repo, revision):
        folder = _download_run(repo, revision, inside, what) / inside
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(
            f"{what}: its {FILE_NAME} is not in the Hub's cache, and the Hub cannot be reached: connect once"
        )
    _check_sum(path, what)
    try:
        read_safetensors(path)
    except UserError as error:
        raise UserError(f"{what}: its {FILE_NAME} is damaged or not a safetensors file") from error
    return folder


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status with which the Hub refused something; None where no answer came."""
    while error is not None:  # the client wraps what fails in one of its threads
        answer = getattr(error, "response", None)
        if answer is not None:
            return int(answer.status_code)
        error = error.__cause__
    return None


def reason(error: BaseException) -> str:
    """Why a request to the Hub failed, in a few words: what it answered, or that no proper answer came."""
    status, said = status_of(error), ""
    while error.__cause__ is not None and not said:
        said, error = getattr(error, "server_message", None) or "", error.__cause__
    if status is None:
        return f"no proper answer from the Hub ({(str(error).splitlines() or [type(error).__name__])[0]})"
    said = " ".join((said or getattr(error, "server_message", None) or "").split())
    meaning = _MEANINGS.get(status, "the Hub has trouble, try later" if status >= 500 else "the Hub refuses it")
    return f"{meaning} ({status}{': ' if said else ''}{said})"


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

    from rewardsr import parcel

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
        if trouble is None or (folder / inside / parcel.FILE_NAME).is_file():  # else a download broke off before it
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
