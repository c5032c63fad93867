"""Captioners on networks of transformers: sentences, or tags.

Both take a folder as transformers writes one, or an id on the Hub, which is fetched once. Weights are safetensors, and
no code of a model's author is run.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from pydantic import Field
from torch import Tensor

from rewardsr.data.images import to_pil
from rewardsr.errors import UserError, is_out_of_memory, one_line
from rewardsr.hub.fetch import fetch
from rewardsr.options import Options

_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # what a model's answers depend on


class ModelOptions(Options):
    """Where a network comes from, and where it computes."""

    model: str = Field(description="Hub id, or folder as transformers writes one")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="auto: a card where there is one")


class ImageToTextOptions(ModelOptions):
    """Options of `image_to_text`."""

    max_new_tokens: int = Field(40, ge=1, le=1000, description="length of a text at most")


class ImageTagsOptions(ModelOptions):
    """Options of `image_tags`."""

    threshold: float = Field(0.5, ge=0, le=1, description="probability from which a tag counts")
    most: int = Field(20, ge=1, le=1000, description="so many tags at most, the likeliest first")


class _Network:
    """A network with its image processor.

    Attributes:
        identity: of the weights, the options that matter and the version of transformers.
    """

    def __init__(self, options: ModelOptions, kind: Any) -> None:
        self._owner = f"captioner's model '{options.model}'"
        self.folder, commit = fetch(options.model, "captioner's model", ("",), options.revision)
        if not (self.folder / "config.json").is_file():
            raise UserError(f"{self._owner}: no config.json in it: give a folder as transformers writes one")
        with _quietly():
            self.processor = self.loaded(transformers.AutoImageProcessor)
            self.network, about = self.loaded(kind, use_safetensors=True, output_loading_info=True)
        absent = sorted(map(str, (*about["missing_keys"], *about["mismatched_keys"])))
        if absent:  # transformers would fill them with random numbers
            raise UserError(f"{self._owner} lacks {len(absent)} weights of {type(self.network).__name__} ({absent[0]})")
        self.device = torch.device(_device(options.device))
        self.network.eval().requires_grad_(False).to(self.device)
        rest = options.model_dump(mode="json", exclude={"model", "revision", "device"})
        made_of = _content(self.folder) if commit == "local" else f"{options.model} {commit}"
        self.identity = f"{made_of} {json.dumps(rest)} transformers {transformers.__version__}"

    def loaded(self, kind: Any, **how: Any) -> Any:
        """What one of transformers' classes makes of the folder.

        Raises:
            UserError: it cannot.
        """
        try:
            return kind.from_pretrained(self.folder, local_files_only=True, trust_remote_code=False, **how)
        except Exception as error:  # whatever a damaged folder, or one of another kind, makes transformers raise
            if is_out_of_memory(error):
                raise
            raise UserError(f"{self._owner} does not load as {kind.__name__}: {one_line(error)}") from error

    def tokenizer(self) -> Any:
        """The one in the folder.

        Raises:
            UserError: there is none, or it is another network's.
        """
        made = self.loaded(transformers.AutoTokenizer)
        known, expected = len(made), int(self.network.config.get_text_config(decoder=True).vocab_size)
        if not 0.9 * expected <= known <= expected:  # networks round theirs up
            raise UserError(
                f"{self._owner}: its tokenizer has {known} words and the network {expected}: files of it are missing"
            )
        return made

    def pixels(self, image: Tensor) -> Any:
        """What the network gets of images (B, 3, h, w) in [0, 1]."""
        return self.processor(images=[to_pil(one) for one in image], return_tensors="pt").to(self.device)


class ImageToText(_Network):
    """A sentence an image, by a network that writes (BLIP, GIT, a vision encoder-decoder); greedy."""

    Options = ImageToTextOptions

    def __init__(self, options: ImageToTextOptions) -> None:
        super().__init__(options, transformers.AutoModelForImageTextToText)
        self._tokenizer = self.tokenizer()
        self._length = options.max_new_tokens

    def __call__(self, image: Tensor) -> list[str]:
        """The texts of images (B, 3, h, w) in [0, 1]."""
        tokens = self.network.generate(**self.pixels(image), max_new_tokens=self._length, do_sample=False, num_beams=1)
        return [str(text) for text in self._tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class ImageTags(_Network):
    """Tags of an image, `a, b, c`, by a network that classifies images.

    Of a multi-label network each label has a probability of its own; of any other, the labels share one.
    """

    Options = ImageTagsOptions

    def __init__(self, options: ImageTagsOptions) -> None:
        super().__init__(options, transformers.AutoModelForImageClassification)
        self._threshold, self._most = options.threshold, options.most
        self._multi = self.network.config.problem_type == "multi_label_classification"

    def __call__(self, image: Tensor) -> list[str]:
        """The texts of images (B, 3, h, w) in [0, 1]."""
        logits = self.network(**self.pixels(image)).logits.float()
        shares = logits.sigmoid() if self._multi else logits.softmax(-1)
        labels = self.network.config.id2label
        likeliest = shares.topk(min(self._most, shares.shape[-1]))
        return [
            ", ".join(str(labels[place]) for share, place in zip(*row, strict=True) if share >= self._threshold)
            for row in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        ]


@contextmanager
def _quietly() -> Iterator[None]:
    """What transformers would warn of while it loads is looked at here; and there is no progress bar."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _device(name: str) -> str:
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, there in available.items() if there)
    if not available[name]:
        raise UserError(f"data.captioner_options: device {name} is not available here: leave it at auto")
    return name


def _content(folder: Path) -> str:
    """A hash of all files of a model."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in _FILES for path in folder.glob(pattern)):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
