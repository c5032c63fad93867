"""Where weights come from: a local folder, or a repository of the Hugging Face Hub."""

import os
import socket
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlparse

from rewardsr.demo import PIPELINE
from rewardsr.errors import UserError

EMBEDDED = "embedded"


@cache
def online(timeout: float = 3.0) -> bool:
    """Whether the Hub's host answers; asked once a process.

    The Hub's client retries for half a minute without a connection, so this is asked first. HF_HUB_OFFLINE and
    HF_ENDPOINT are honoured; behind a proxy the proxy's host is tried.

    Args:
        timeout: seconds to wait for the connection.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return False
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    target = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or endpoint
    parts = urlparse(target if "//" in target else f"//{target}")
    answered: list[bool] = []

    def connect() -> None:
        with (
            suppress(OSError),
            socket.create_connection((parts.hostname or "", parts.port or 443), timeout=timeout),
        ):
            answered.append(True)

    # In a thread, because looking up the name may take far longer than `timeout` and knows none of its own.
    probe = threading.Thread(target=connect, daemon=True)
    probe.start()
    probe.join(timeout)
    return bool(answered)


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
    return _download(source, what, folders, revision)


def _download(source: str, what: str, folders: tuple[str, ...], revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = ["model_index.json"]
    for folder in folders:
        patterns += [f"{folder}/*.json", f"{folder}/*.txt", f"{folder}/*.safetensors"]
    try:
        path = snapshot_download(
            source,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*.fp16.*"],
            local_files_only=not online(),
        )
    except GatedRepoError as error:
        raise UserError(f"{what} '{source}' is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} '{source}' has no revision '{revision}'") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{what} '{source}' is not on the Hub or not visible to you: check the name, try a mirror, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{what} '{source}' is neither a folder here nor in the Hub's cache, and the Hub cannot be reached: "
            "give a local folder, or connect once"
        ) from error
    except Exception as error:  # no connection is requests' error or httpx's, by the version of the Hub's client
        raise UserError(f"{what} '{source}': download failed: {' '.join(str(error).split())}") from error
    downloaded = Path(path)
    return downloaded, downloaded.name
