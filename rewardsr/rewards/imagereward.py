"""ImageReward v1.0 (Xu et al. 2023, arXiv 2304.05977): how much people would like an image that a text asked for.

BLIP: a ViT-L/16 reads the image, BERT base reads the text and attends to the image in every layer, and five linear
layers make a score of the first text token. The networks are transformers' own, and the released tensors go into them
under other names: the package image-reward does not import beside current transformers.
"""

import re
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rewardsr.batch import Batch
from rewardsr.errors import UserError, one_line
from rewardsr.options import Options
from rewardsr.rewards.precision import Wanted, chosen, computing
from rewardsr.rewards.pretrained import Checkpoint, from_hub, local_file
from rewardsr.storage import expand

OWNER = "reward 'imagereward'"  # in messages
WEIGHTS = ("THUDM/ImageReward", "ImageReward.pt")  # on the Hub: repository, file
VOCABULARY = ("google-bert/bert-base-uncased", "vocab.txt")
LENGTH = 35  # tokens: texts are padded or cut to it
RAW_MEAN, RAW_STD = 0.16717362830052426, 1.0333394966054072  # of the released head's output; scores are relative to it
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# What the score does not use: BLIP's contrastive projections, momentum copies and queues, and indices kept as a tensor.
UNUSED = re.compile(r"blip\.((vision_proj|text_proj|\w+_m)\.|(\w+_)?queue(_\w+)?$|text_encoder\..*position_ids$)")

# Of the released networks: ViT-L/16, BERT base, and the linear layers of the head.
VISION_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 16,
}
TEXT_SIZES = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "encoder_hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
HEAD_WIDTHS = (768, 1024, 128, 64, 16, 1)
HEAD_LAYERS = ("0", "2", "4", "6", "7")  # the others are dropout; no activation lies between

VISION, TEXT, HEAD = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
_RELEASED_NAMES = (  # by transformers' names
    ("text.", TEXT),
    ("head.", HEAD),
    ("vision.embeddings.class_embedding", f"{VISION}cls_token"),
    ("vision.embeddings.position_embedding", f"{VISION}pos_embed"),
    ("vision.embeddings.patch_embedding.", f"{VISION}patch_embed.proj."),
    ("vision.post_layernorm.", f"{VISION}norm."),
    ("vision.encoder.layers.", f"{VISION}blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
)


class ImageRewardOptions(Options):
    """Files, and how images are made smaller."""

    weights: Path | None = Field(None, description="ImageReward.pt, or a .safetensors of its tensors; None: the Hub's")
    tokenizer: Path | None = Field(
        None, description="folder of bert-base-uncased's tokenizer, or its vocab.txt; None: the Hub's"
    )
    antialias: bool = Field(
        True,
        description="smooth images that are made smaller, as the original does on PIL images; RFSR trained without "
        "(torchvision before 0.17 on tensors)",
    )
    precision: Wanted = Field(
        "auto",
        description="of the network: fp32; tf32 (of CUDA; elsewhere fp32), which moves a score by about 1e-4; bf16, by "
        "1e-3; auto: tf32",
    )


class ImageReward:
    """ImageReward of `sr` and its text; higher is better, about N(0, 1) over the images that it was trained on.

    The text is the batch's prompt; an empty one is allowed. Attributes are those of `Reward`.
    """

    name = "imagereward"
    differentiable = True
    needs_hq = False
    licence = "Apache-2.0"
    kind = "detail"

    Options = ImageRewardOptions

    def __init__(self, options: ImageRewardOptions) -> None:
        """Load the network; a file that is not given comes from the Hub's cache, else is downloaded.

        Raises:
            UserError: files that cannot be had, read or fitted.
        """
        # Both files are found before anything is read: the weights are 1.8 GB.
        if options.weights is None:
            weights = from_hub(OWNER, *WEIGHTS, "give options: {weights: PATH}")
        else:
            weights = local_file(OWNER, options.weights)
        if options.tokenizer is None:
            words_path = from_hub(OWNER, *VOCABULARY, "give options: {tokenizer: PATH}")
        else:
            words_path = expand(options.tokenizer)
        self._tokenizer = _read_tokenizer(words_path)
        self._network = _fitted(Checkpoint(OWNER, weights, UNUSED))
        # The released vocabulary is BERT's and two words more, which begin other tasks than this one.
        words = TEXT_SIZES["vocab_size"]
        if len(self._tokenizer) not in (words, words - 2):
            raise UserError(
                f"{OWNER}: tokenizer '{words_path}' has {len(self._tokenizer)} words, expected "
                f"{words - 2}: give bert-base-uncased"
            )
        self._side = VISION_SIZES["image_size"]
        self._antialias = options.antialias
        self._precision = chosen(OWNER, self._network, options.precision)
        self._device = torch.device("cpu")
        self._tokens = lru_cache(maxsize=4096)(self._tokenise)

    def __call__(self, sr: Tensor, batch: Batch) -> Tensor:
        """Score images against their texts, in the reward's own precision whatever autocast says; gradients reach `sr`.

        Args:
            sr: (B, 3, H, W) RGB in [0, 1].
            batch: its `prompts`, one text an image.

        Returns:
            (B,) float32, mostly in [-2.5, 2.5], on the device of `sr`.

        Raises:
            UserError: an image has no text.
            ValueError: another number of texts than images.
        """
        prompts = batch.prompts
        if prompts is None or None in prompts:
            raise UserError(
                f"{OWNER} needs prompts, and there are none: set data.prompts to sidecar, or to one text for all"
            )
        if len(prompts) != len(sr):
            raise ValueError(f"imagereward: expected one text an image, got {len(prompts)} for {len(sr)}")
        if sr.device != self._device:
            self._network.to(sr.device)
            self._device = sr.device
        ids, mask = torch.stack([self._tokens(text) for text in prompts]).to(sr.device).unbind(1)
        with computing(sr.device):
            pixels = preprocess(sr, self._side, self._antialias)
        with computing(sr.device, self._precision):
            return (self._network(pixels, ids, mask).float() - RAW_MEAN) / RAW_STD

    def _tokenise(self, text: str) -> Tensor:
        """Token ids and the mask that marks padding with 0, as (2, LENGTH) int64 on the CPU."""
        tokens = self._tokenizer(text, padding="max_length", truncation=True, max_length=LENGTH)
        return torch.tensor([tokens["input_ids"], tokens["attention_mask"]])


def preprocess(image: Tensor, side: int = 224, antialias: bool = True) -> Tensor:
    """The network's view of an image: shorter side resized (bicubic), centre cut out, colours normalised as for CLIP.

    Values that bicubic interpolation overshoots stay, other than on PIL images.

    Args:
        image: (B, 3, H, W) RGB in [0, 1].
        side: of the result, in pixels.
        antialias: whether to smooth where the image gets smaller.

    Returns:
        (B, 3, side, side) float32, differentiable.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional  # takes seconds to import

    resized = functional.resize(image.float(), [side], interpolation=InterpolationMode.BICUBIC, antialias=antialias)
    return functional.normalize(functional.center_crop(resized, [side, side]), list(CLIP_MEAN), list(CLIP_STD))


# ---- the network ----


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel  # takes seconds

        vision = BlipVisionConfig(**VISION_SIZES, hidden_act="gelu", layer_norm_eps=1e-6, attn_implementation="eager")
        text = BlipTextConfig(
            **TEXT_SIZES,
            hidden_act="gelu",
            layer_norm_eps=1e-12,
            bos_token_id=None,  # tokens come from the tokenizer
            sep_token_id=None,
            is_decoder=True,  # is how it gets cross attention; `forward` runs it as an encoder
            attn_implementation="eager",  # the only one that it has; masks are made to fit
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        layers = zip(HEAD_LAYERS, HEAD_WIDTHS[:-1], HEAD_WIDTHS[1:], strict=True)
        self.head = nn.Sequential(OrderedDict((name, nn.Linear(before, after)) for name, before, after in layers))

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Raw scores (B,) of normalised pixels (B, 3, S, S) and token ids (B, L) with their mask."""
        image = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(image.shape[:2], dtype=torch.long, device=image.device),
            is_decoder=False,
        ).last_hidden_state
        return self.head(text[:, 0]).squeeze(1)


def _fitted(checkpoint: Checkpoint) -> _Network:
    """The network with the weights of a file, frozen, in float32."""
    with torch.device("meta"):  # without storage, and without draws for weights that are replaced anyway
        network = _Network()
    places = torch.arange(TEXT_SIZES["max_position_embeddings"])[None]
    network.text.embeddings.position_ids = places  # no part of the state
    return checkpoint.fit(network, _released_name)


def _released_name(name: str) -> str:
    for ours, theirs in _RELEASED_NAMES:
        name = name.replace(ours, theirs) if ours.startswith(".") else re.sub(f"^{re.escape(ours)}", theirs, name)
    return name


# ---- the tokenizer ----


def _read_tokenizer(path: Path) -> Any:
    """A BERT tokenizer, lower-casing, from its vocabulary or from a folder."""
    if not path.exists():
        raise UserError(f"{OWNER}: no tokenizer '{path}'")
    files = [path] if path.is_file() else [path / name for name in ("tokenizer.json", "vocab.txt")]
    if not any(file.is_file() for file in files):
        raise UserError(f"{OWNER}: tokenizer '{path}' has neither tokenizer.json nor vocab.txt")
    from transformers import BertTokenizer

    try:
        if path.is_file():
            return BertTokenizer(str(path))
        return BertTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # of its library in another language, without a kind
        raise UserError(f"{OWNER}: tokenizer '{path}' cannot be read: {one_line(error)}") from error
