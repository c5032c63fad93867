"""What a repository holds of a run: the files to publish or fetch, and every check that needs no connection."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from rewardsr.errors import UserError
from rewardsr.hub import fetch
from rewardsr.lora.file import OUR_HEADER
from rewardsr.run_folder import LORA, METRICS, READY, RECIPE, VALIDATION
from rewardsr.storage import write_bytes, write_folder
from rewardsr.train.recipe import load_recipe
from rewardsr.weights import read_safetensors

TAG = "rewardsr"  # in the card's front matter, for others to search by
CARD, SAMPLES = "README.md", "samples"
FILES = (LORA, RECIPE, CARD)  # fetched again, with the samples; the log of the training is not
PATTERNS = (*FILES, f"{SAMPLES}/*.png", f"{SAMPLES}/*.json")
SAMPLE = f"{SAMPLES}/validation"  # the same name for every run: a second push leaves no stale picture behind
PICKLES = (".bin", ".pkl", ".pickle", ".pt", ".pth", ".ckpt")
LARGEST = 5 * 10**9  # bytes; a LoRA has a thousandth of that


@dataclass(frozen=True)
class Entry:
    """A file to be published.

    Attributes:
        name: its path in the repository.
        source: where it is on the disk, or its content.
        size: in bytes.
    """

    name: str
    source: Path | bytes
    size: int

    def content(self) -> bytes:
        """All of it."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def hashes(self) -> set[str]:
        """By which the Hub knows it: as a large file, and as git knows small ones."""
        content = self.content()
        blob = b"blob %d\0" % len(content) + content
        return {hashlib.sha256(content).hexdigest(), hashlib.sha1(blob, usedforsecurity=False).hexdigest()}


@dataclass(frozen=True)
class Plan:
    """What a push is going to do.

    Attributes:
        run: folder of the run.
        repo: "user/name".
        files: what the repository will hold of it.
        private: whether a repository that has to be created becomes private.
        revision: branch to commit to; None is main.
        create_pr: open a pull request instead.
    """

    run: Path
    repo: str
    files: tuple[Entry, ...]
    private: bool = False
    revision: str | None = None
    create_pr: bool = False

    def lines(self) -> Iterator[str]:
        """The plan for people to read."""
        where = " as a pull request" if self.create_pr else f", branch {self.revision}" if self.revision else ""
        yield f"{len(self.files)} files for '{self.repo}'{where}:"
        for entry in self.files:
            yield f"  {entry.size:>12,d} bytes  {entry.name}"

    @property
    def later(self) -> str:
        """The command that uploads the ready folder, with nothing but the Hub's own client."""
        options = ["--private"] * self.private + ["--create-pr"] * self.create_pr
        options += ["--revision", self.revision] if self.revision else []
        return shlex.join(["hf", "upload", self.repo, str(self.run / READY), ".", *options])


def prepare(run: Path, repo: str, card: str | None = None, **options: Any) -> Plan:
    """Check that a run can be published, and list what would be.

    Args:
        run: its folder.
        repo: "user/name".
        card: text of README.md; None makes it from the run.
        options: of `Plan`.

    Raises:
        UserError: it is not a finished run, something in it is damaged, or the card or the name is invalid.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if fetch.split_reference(repo)[1] is not None:
        raise UserError(f"'{repo}': give the branch as --revision")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' cannot be a repository's name: {' '.join(str(error).split())}") from error
    if not (run / RECIPE).is_file():
        raise UserError(f"'{run}' is not the folder of a run: no {RECIPE}")
    steps = load_recipe(str(run / RECIPE), {}, []).steps
    if not (run / LORA).is_file():
        raise UserError(f"the run in '{run}' has no {LORA}: it is not finished; go on with finetune --resume")
    if (run / LORA).stat().st_size > LARGEST:
        raise UserError(f"'{run / LORA}' is larger than {LARGEST // 10**9} GB: that is no LoRA")
    check_lora(run / LORA, f"'{run / LORA}'")
    _check_metrics(run / METRICS, steps)
    sources = {LORA: run / LORA, RECIPE: run / RECIPE, METRICS: run / METRICS, **_samples(run)}
    if card is None:
        from rewardsr.hub.card import build_card

        card = build_card(run, repo)
    check_card(card, set(sources))
    entries = [Entry(name, path, path.stat().st_size) for name, path in sources.items()]
    text = card.encode()
    return Plan(run, repo, (Entry(CARD, text, len(text)), *entries), **options)


def check_lora(path: Path, what: str) -> None:
    """Refuse a LoRA that could not be used.

    Args:
        path: the file.
        what: how to call it in the message.

    Raises:
        UserError: it is damaged, not written by rewardsr, or holds values that are not finite.
    """
    tensors, header = read_safetensors(path)
    try:
        known = isinstance(json.loads(header[OUR_HEADER])["base"], dict)
    except (ValueError, KeyError, TypeError):
        known = False
    if not known or not tensors:
        raise UserError(f"{what} does not say which base it belongs to: not written by rewardsr")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{what}: {name} holds values that are not finite")


def check_card(text: str, files: set[str]) -> None:
    """Refuse a card that the Hub would, or that would not be found.

    Args:
        text: of README.md.
        files: names of the other files in the repository; pictures must be among them.

    Raises:
        UserError: no front matter or none that parses, a base that cannot be one, no tag to be found by, or a picture
            that would not be there.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id

    if not text.lstrip().startswith("---"):
        raise UserError(f"the card ({CARD}) has no front matter: it begins with a block of YAML between --- lines")
    try:
        data: Any = ModelCard(text).data
        bases = data.base_model or []
        for base in [bases] if isinstance(bases, str) else bases:
            validate_repo_id(base)
        tags = data.tags if isinstance(data.tags, list) else []
        if not isinstance(data.license, str | None):
            raise ValueError("license is not one name")
    except Exception as error:  # YAML's, the Hub's client's, or Python's from inside it
        raise UserError(f"the card ({CARD}) is invalid: {' '.join(str(error).split())}") from error
    if TAG not in tags:
        raise UserError(f"the card ({CARD}) lacks the tag '{TAG}', by which adapters are found")
    for picture in re.findall(r"!\[[^\]]*\]\(([^)\s]+)", text):
        if "://" not in picture and picture not in files:
            raise UserError(f"the card ({CARD}) shows '{picture}', which would not be in the repository")


def published(names: Iterable[str], inside: str = "") -> list[str]:
    """Those of a repository's file names that belong to a published run: LoRA, recipe, card and samples.

    Args:
        names: paths in the repository.
        inside: sub-folder that they lie in, with its slash.
    """
    sample = re.compile(rf"{re.escape(inside)}{SAMPLES}/\w[\w.-]*\.(png|json)")
    ours = {inside + name for name in FILES}
    return sorted(name for name in names if name in ours or sample.fullmatch(name))


def chosen(there: list[str], inside: str, what: str) -> list[str]:
    """What to download of the files that a repository says it has.

    Args:
        there: their names.
        inside: sub-folder that the LoRA is to be in, with its slash.
        what: how to call the LoRA in messages.

    Raises:
        UserError: a name leads out of the repository, or there is no LoRA of ours.
    """
    for name in filter(leads_out, there):
        raise UserError(f"{what}: the repository has a file named {name!r}, which leads out of it: nothing was fetched")
    ours, wanted = published(there, inside), inside + LORA
    if wanted in ours:
        return ours
    weights = [name for name in there if name.endswith((".safetensors", *PICKLES))]
    if not weights:
        raise UserError(f"{what}: there is no {wanted} in that repository: not published with rewardsr push")
    hint = "pickles can run code and are refused" if weights[0].endswith(PICKLES) else "not one of ours"
    raise UserError(f"{what}: there is no {wanted} in that repository, but '{weights[0]}': {hint}")


def leads_out(name: str) -> bool:
    """Whether a path of a repository would be written elsewhere than below its own folder, on any system."""
    path = PureWindowsPath(name)  # knows both kinds of slashes
    return bool(path.anchor or path.drive) or ".." in path.parts or not name.isprintable()


def _check_metrics(path: Path, steps: int) -> None:
    last = 0
    try:
        for line in path.read_text().splitlines():
            last = int(json.loads(line)["step"])
    except OSError as error:
        raise UserError(f"'{path}': {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"'{path}' is damaged: not a step's metrics in every line") from error
    if last < steps:
        raise UserError(f"'{path}' ends at step {last} of {steps}: the run is not finished; go on with --resume")


def _samples(run: Path) -> dict[str, Path]:
    """Scores and pictures of the newest validation, if there was one, by their names in the repository."""
    newest = {kind: max((run / VALIDATION).glob(f"step-*{kind}"), default=None) for kind in (".json", ".png")}
    return {SAMPLE + kind: path for kind, path in newest.items() if path is not None}


def write_ready(plan: Plan) -> None:
    """Write the folder to upload later, in place of an earlier one."""

    def fill(folder: Path) -> None:
        for entry in plan.files:
            write_bytes(folder / entry.name, entry.content())

    ready, earlier = plan.run / READY, plan.run / f".{READY}.tmp"  # so called, it would go with other leftovers
    shutil.rmtree(earlier, ignore_errors=True)
    try:
        if ready.exists():
            ready.replace(earlier)
        write_folder(ready, fill)
    except BaseException:
        if earlier.exists():
            earlier.replace(ready)
        raise
    shutil.rmtree(earlier, ignore_errors=True)
