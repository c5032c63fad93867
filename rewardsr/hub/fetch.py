"""Fetching base weights and the LoRAs of published runs: from a folder, the Hub's cache or the Hub. Needs no torch."""

import glob
import hashlib
import io
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from tqdm import tqdm  # type: ignore[import-untyped]

from rewardsr import progress
from rewardsr.errors import UserError
from rewardsr.hub.connection import TIMEOUT, online, reason, status_of
from rewardsr.hub.outline import in_outline, origin_of
from rewardsr.json_object import parse_object
from rewardsr.outline import is_outlined
from rewardsr.run_folder import CARD, LORA, OUR_HEADER, RECIPE, SAMPLES
from rewardsr.storage import expand, write_folder

EMBEDDED = "embedded"
PIPELINE = Path(__file__).parents[1] / "demo" / "pipeline"  # the embedded one, in the usual diffusers layout

LARGEST = 5 * 10**9  # bytes; a LoRA has a thousandth of that
LARGEST_TEXT = 10**8  # of any other file of a published run
_FILES = (LORA, RECIPE, CARD)  # fetched of a published run, with the samples; the log of its training is not
_PICKLES = (".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")
_WEIGHTS = (".safetensors", *_PICKLES)  # ends of files, not of repositories
_REFERENCE = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\S+))?")


def is_reference(text: str) -> bool:
    """Whether this names a Hub repository, user/name or user/name@revision, rather than something on the disk."""
    found = _REFERENCE.fullmatch(text)
    return found is not None and not found["repo"].endswith(_WEIGHTS) and not os.path.lexists(text)


def split_reference(text: str) -> tuple[str, str | None]:
    """Repository and revision of "user/name" or "user/name@revision".

    Raises:
        UserError: it is neither.
    """
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise UserError(f"'{text}' is not a Hub id of the form user/name or user/name@revision")
    return found["repo"], found["revision"]


def fetch(
    source: str, what: str, folders: tuple[str, ...], revision: str | None = None, *, outlines: bool = False
) -> tuple[Path, str]:
    """A local folder with the named parts of a diffusers repository.

    Args:
        source: path of a folder, a Hub id ("user/name"), or "embedded" for the small pipeline that comes along.
        what: what is being fetched, for messages ("base").
        folders: sub-folders that are needed ("": the top); configuration and safetensors of these are downloaded.
        revision: branch, tag or commit of a Hub repository.
        outlines: the folders are networks that the caller reads in outline where `rewardsr.outline` says so, and of
            these no more is downloaded. Whoever reads them otherwise finds zeros there.

    Returns:
        The folder and the revision it is at ("local", "embedded", or the commit).

    Raises:
        UserError: no such folder or repository, or it is not in the cache and there is no connection.
    """
    if source == EMBEDDED:
        return PIPELINE, EMBEDDED
    local = expand(source)
    if local.is_dir():
        return local, "local"
    if local.exists():
        raise UserError(f"{what} '{source}' is a file: give the folder of a diffusers pipeline, or a Hub id")
    if source.count("/") != 1 or source[:1] in "./~" or source.endswith("/"):
        raise UserError(f"{what} '{source}': no such folder, and not a Hub id of the form user/name")
    outlined = [folder for folder in folders if is_outlined(folder)] if outlines and online() else []
    whole = [folder for folder in folders if folder not in outlined]
    wanted = [f"{folder}/*.{end}".lstrip("/") for folder in folders for end in ("json", "txt")]
    wanted += [f"{folder}/*.safetensors".lstrip("/") for folder in whole]
    with _explained(what, source, revision), _counted(f"fetching {source}") as counter:
        path = Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=["model_index.json", *wanted],
                ignore_patterns=["*.fp16.*"],
                local_files_only=not online(),
                tqdm_class=counter,
            )
        )
        networks = [folder for folder in whole if (path / folder / "config.json").is_file()]
        halves = [
            f"{folder}/*.fp16.*".lstrip("/") for folder in networks if not any((path / folder).glob("*.safetensors"))
        ]
        if halves and online():  # networks that are there in half precision only
            snapshot_download(source, revision=path.name, allow_patterns=halves, tqdm_class=counter)
        return in_outline(source, path, outlined) if outlined else path, path.name


def fetch_whole(part: Path) -> Path:
    """The folder of a network, downloaded whole if `fetch` has its outline alone.

    Raises:
        UserError: as `fetch`.
    """
    origin = origin_of(part.parent)
    if origin is None:
        return part
    repo, commit = origin
    files = [f"{part.name}/{path.name}" for path in part.iterdir()]
    with _explained("base", repo, commit), _counted(f"fetching {repo}") as counter:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=files, tqdm_class=counter)) / part.name


def fetch_lora(reference: str, subfolder: str | None = None) -> Path:
    """A local folder with what a repository holds of a published run: LoRA, recipe, card and samples.

    They come from the Hub's cache where they are there already, and from nowhere else without a connection.

    Args:
        reference: "user/name" or "user/name@revision" (branch, tag or commit).
        subfolder: where in the repository the LoRA lies, if not at its top.

    Raises:
        UserError: no such repository or revision, no connection and nothing in the cache, no LoRA there, a file name
            that leads out of its folder, or a LoRA that `check_lora` refuses.
    """
    repo, revision = split_reference(reference)
    what, inside = f"LoRA '{reference}'", "" if subfolder is None else f"{subfolder}/"
    if _leads_out(inside + LORA):
        raise UserError(f"{what}: subfolder '{subfolder}' leads out of the repository")
    with _explained("LoRA", repo, revision):
        folder = _download_run(repo, revision, inside, what) / inside
    path = folder / LORA
    if not path.is_file():
        raise UserError(f"{what}: its {LORA} is not in the Hub's cache, and the Hub cannot be reached: connect once")
    _check_sum(path, what)
    check_lora(path, what)
    return folder


def pull(reference: str, output: Path | str | None = None) -> Path:
    """Fetch a published adapter.

    Args:
        reference: "user/name" or "user/name@revision".
        output: new or empty folder to copy it to; None leaves it in the Hub's cache.

    Returns:
        The folder, which has the layout of a run: LoRA, recipe, card and samples.

    Raises:
        UserError: as `fetch_lora`; or the folder is in use, or cannot be written.
    """
    target = None if output is None else expand(output).absolute()
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output '{output}' is not empty: choose a new folder")
    folder = fetch_lora(reference)
    if target is None:
        return folder

    def fill(copy: Path) -> None:
        held = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in _of_a_run(held, ""):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, copy / name)  # of the cache there are only links

    write_folder(target, fill)
    return target


def check_lora(path: Path, what: str) -> dict[str, Any]:
    """Refuse a LoRA that could not be used; read with numpy.

    Args:
        path: the file.
        what: how to call it in the message.

    Returns:
        What its header says: "base" (with "id" and "revision"), "rank", "alpha" and more.

    Raises:
        UserError: it is damaged, not written by rewardsr, or holds values that are not finite.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{what} is larger than {LARGEST // 10**9} GB: that is no LoRA")
        with safe_open(path, framework="numpy") as file:
            about = parse_object((file.metadata() or {})[OUR_HEADER], what)
            if not isinstance(about["base"]["revision"], str) or not math.isfinite(about["rank"] + about["alpha"]):
                raise ValueError("no revision, rank or alpha")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what} is damaged or not a safetensors file: {error}") from error
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # A TypeError is also what a bfloat16 gives, which numpy does not know.
        raise UserError(
            f"{what} was not written by rewardsr: no base, rank and alpha in its header, or not float32"
        ) from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise UserError(f"{what}: {name} holds values that are not finite")
    return about


@contextmanager
def _explained(what: str, source: str, revision: str | None) -> Iterator[None]:
    """Turns what can go wrong while `source` is fetched into one line."""
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
        if isinstance(error, OSError) and error.filename:  # of the disk, not of the network
            place = f"{error.strerror}: '{error.filename}'"
            raise UserError(f"{what} '{source}': the Hub's cache cannot be used: {place}; look at HF_HOME") from error
        raise UserError(f"{what} '{source}': download failed: {reason(error)}") from error


@contextmanager
def _counted(what: str) -> Iterator[type[tqdm]]:
    """The class that the Hub's client is to count bytes and files with: they show in a bar of ours, in bytes if it says
    how many there are."""
    with progress.bar(what, None, unit="B") as advance:
        reached = 0

        class Counter(tqdm):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                self._bytes = kwargs.get("unit") == "B"
                known = {name: kwargs[name] for name in ("total", "initial", "unit") if name in kwargs}
                super().__init__(*args, **known, file=io.StringIO(), mininterval=0)

            def display(self, *_: Any, **__: Any) -> bool:
                nonlocal reached
                if self._bytes and self.total:
                    more = max(0, int(self.n) - reached)  # it counts twice: what came, and what it made of that
                    reached += more
                    advance(more, total=int(self.total))
                return True

        yield Counter


def _download_run(repo: str, revision: str | None, inside: str, what: str) -> Path:
    """The files of a published run, once the repository's list of names has been looked at; or from the cache."""
    trouble: Exception | None = None
    if online():
        try:
            info = HfApi().model_info(repo, revision=revision, timeout=TIMEOUT, files_metadata=True)
            names = _to_fetch({file.rfilename: file.size or 0 for file in info.siblings or []}, inside, what)
            with _counted(f"fetching {repo}") as counter:
                patterns = list(map(glob.escape, names))
                return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, tqdm_class=counter))
        except Exception as error:
            if isinstance(error, UserError) or 400 <= (status_of(error) or 0) < 500:
                raise
            trouble = error  # no answer, or the Hub has trouble: the cache may do
    patterns = [glob.escape(inside) + name for name in (*_FILES, f"{SAMPLES}/*.png", f"{SAMPLES}/*.json")]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, local_files_only=True))
        if trouble is None or (folder / inside / LORA).is_file():  # else a download broke off before it
            return folder
    except LocalEntryNotFoundError as error:
        trouble = trouble or error
    raise trouble


def _to_fetch(held: Mapping[str, int], inside: str, what: str) -> list[str]:
    """What to download of the files that a repository says it holds, with their sizes in bytes; `inside` is a
    sub-folder with its slash.

    Raises:
        UserError: a name leads out of the repository, there is no LoRA of ours, or a file is larger than any of a run.
    """
    for name in filter(_leads_out, held):
        raise UserError(f"{what}: the repository has a file named {name!r}, which leads out of it: nothing was fetched")
    ours, wanted = _of_a_run(held, inside), inside + LORA
    for name in ours:
        if held[name] > (LARGEST if name == wanted else LARGEST_TEXT):
            raise UserError(f"{what}: its {name} has {held[name]:,d} bytes, which none of a run has: not fetched")
    if wanted in ours:
        return ours
    weights = [name for name in held if name.endswith(_WEIGHTS)]
    if not weights:
        raise UserError(f"{what}: there is no {wanted} in that repository: not published with rewardsr push")
    hint = "pickles can run code and are refused" if weights[0].endswith(_PICKLES) else "not one of ours"
    raise UserError(f"{what}: there is no {wanted} in that repository, but '{weights[0]}': {hint}")


def _of_a_run(names: Iterable[str], inside: str) -> list[str]:
    """Those file names in the sub-folder `inside` that belong to a published run: LoRA, recipe, card and samples."""
    sample = re.compile(rf"{re.escape(inside)}{SAMPLES}/\w[\w.-]*\.(png|json)")
    ours = {inside + name for name in _FILES}
    return sorted(name for name in names if name in ours or sample.fullmatch(name))


def _leads_out(name: str) -> bool:
    """Whether a path of a repository would be written elsewhere than below its own folder, on any system."""
    path = PureWindowsPath(name)  # knows both kinds of slashes
    return bool(path.anchor or path.drive) or ".." in path.parts or not name.isprintable()


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
