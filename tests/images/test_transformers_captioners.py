"""The built-in captioners, on real networks of transformers: tiny ones of random weights, saved to folders."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from rewardsr.data import captioners
from rewardsr.data.captions import Captions
from rewardsr.data.degrade.light import Light, LightOptions
from rewardsr.data.folder import open_data
from rewardsr.data.images import to_pil
from rewardsr.errors import UserError
from rewardsr.run_folder import RECIPE
from rewardsr.train.recipe import load_recipe

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "grass", "dog", "red", "green"]
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TINY, "image_size": 32, "patch_size": 16}
SQUARE = {"height": 32, "width": 32}
MARKS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
LABELS = {0: "dog", 1: "grass", 2: "sky", 3: "red"}
LIGHT = Light(LightOptions(), 4)


def blip() -> transformers.BlipForConditionalGeneration:
    text = {**TINY, **MARKS, "vocab_size": len(WORDS), "encoder_hidden_size": 16, "sep_token_id": 3}
    config = transformers.BlipConfig(vision_config=VISION, text_config=text, projection_dim=16)
    return transformers.BlipForConditionalGeneration(config)


def git() -> transformers.GitForCausalLM:
    return transformers.GitForCausalLM(
        transformers.GitConfig(vision_config=VISION, vocab_size=len(WORDS), **TINY, **MARKS)
    )


def encoder_decoder() -> transformers.VisionEncoderDecoderModel:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2}
    text = transformers.GPT2Config(vocab_size=len(WORDS), **sizes, add_cross_attention=True, **MARKS)
    both = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(transformers.ViTConfig(**VISION), text)
    made = transformers.VisionEncoderDecoderModel(both)
    for config in (made.config, made.generation_config):
        config.decoder_start_token_id, config.pad_token_id = 2, 0
    return made


KINDS = {"blip": blip, "git": git, "encoder_decoder": encoder_decoder}


def save(folder: Path, network: transformers.PreTrainedModel, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    for value in network.parameters():  # as they are made they say one thing of all images
        value.data = torch.randn(value.shape, generator=generator)
    network.save_pretrained(folder)
    transformers.ViTImageProcessor(size=SQUARE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def writer(request, tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp(request.param) / "writer", KINDS[request.param]())


@pytest.fixture(scope="module")
def git_writer(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("git") / "writer", git())


def written(folder: Path, network: transformers.PreTrainedModel) -> Path:
    transformers.BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)}).save_pretrained(folder)
    return save(folder, network, 3)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Path:
    return tagging(tmp_path_factory.mktemp("tags") / "tagger", 2, problem_type="multi_label_classification")


def tagging(folder: Path, seed: int, **about: str) -> Path:
    config = transformers.ViTConfig(**VISION, id2label=LABELS, label2id={v: k for k, v in LABELS.items()}, **about)
    return save(folder, transformers.ViTForImageClassification(config), seed)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rewardsr" / "captions"


def images(count: int = 4) -> torch.Tensor:
    return torch.rand(count, 3, 20, 28, generator=torch.Generator().manual_seed(0))


def captions(name: str, folder: Path, suffix: str = "", **options) -> Captions:
    return Captions(name, {"model": str(folder), "device": "cpu", **options}, suffix)


# ---- what they say ----


def test_sentences_are_what_the_network_writes(writer) -> None:
    said = captions("image_to_text", writer, max_new_tokens=6)(images())
    network = transformers.AutoModelForImageTextToText.from_pretrained(writer).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(writer)
    words = transformers.AutoTokenizer.from_pretrained(writer)
    for image, text in zip(images(), said, strict=True):
        pixels = processor(images=to_pil(image), return_tensors="pt").pixel_values
        tokens = network.generate(pixel_values=pixels, max_new_tokens=6, do_sample=False)
        assert text == words.decode(tokens[0], skip_special_tokens=True) and set(text.split()) <= set(WORDS)
    assert any(said)


@pytest.mark.parametrize("kind", ["multi_label_classification", "single_label_classification"])
def test_tags_are_the_likely_labels_the_likeliest_first(kind, tmp_path) -> None:
    folder = tagging(tmp_path / "tagger", 2, problem_type=kind)
    network = transformers.ViTForImageClassification.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = network(**processor(images=[to_pil(image) for image in images()], return_tensors="pt")).logits
    shares = logits.sigmoid() if kind.startswith("multi") else logits.softmax(1)
    for threshold, most in ((0.5, 20), (0.1, 2), (0.0, 20)):
        said = captions("image_tags", folder, threshold=threshold, most=most)(images())
        for text, row in zip(said, shares, strict=True):
            likely = [LABELS[place] for place in row.argsort(descending=True).tolist() if row[place] >= threshold]
            assert text == ", ".join(likely[:most])


# ---- kept on the disk ----


def test_texts_of_whole_images_are_kept_and_belong_to_their_network(git_writer, cache, monkeypatch) -> None:
    asked = []
    real = captioners.ImageToText.__call__
    monkeypatch.setattr(captioners.ImageToText, "__call__", lambda self, image: (asked.append(1), real(self, image))[1])
    first = captions("image_to_text", git_writer)(images(), keep=True)
    assert len(asked) == 4 and len(list(cache.rglob("*.txt"))) == 4
    assert captions("image_to_text", git_writer)(images(), keep=True) == first and len(asked) == 4
    copy = shutil.copytree(git_writer, cache.parent / "elsewhere")
    assert captions("image_to_text", copy)(images(), keep=True) == first and len(asked) == 4
    assert captions("image_to_text", git_writer, "sharp")(images()[:1], keep=True) == (f"{first[0]}, sharp",)
    assert len(asked) == 4  # the suffix is none of the network's
    captions("image_to_text", git_writer, max_new_tokens=3)(images(), keep=True)
    assert len(asked) == 8
    state = load_file(copy / "model.safetensors")
    name = min(name for name in state if name.endswith("weight"))
    state[name].view(-1)[len(state[name].view(-1)) // 2] += 1e-3  # one weight of one layer
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    captions("image_to_text", copy)(images(), keep=True)
    assert len(asked) == 12
    captions("image_to_text", git_writer)(images(8), keep=False)
    assert len(asked) == 20 and len(list(cache.rglob("*.txt"))) == 12


def test_a_captioner_without_identity_is_never_kept(cache) -> None:
    Captions("strangers:shade")(images(), keep=True)
    assert not cache.exists()


def test_a_cache_can_be_chosen_and_one_that_cannot_be_written_to_is_refused(tagger, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REWARDSR_CACHE", str(tmp_path / "mine"))
    captions("image_tags", tagger)(images(), keep=True)
    assert len(list((tmp_path / "mine" / "captions").rglob("*.txt"))) == 4
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REWARDSR_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="is a file; give a folder"):
        captions("image_tags", tagger)


# ---- in use ----


def test_many_empty_texts_are_said_once(tagger, caplog) -> None:
    captions("image_tags", tagger, threshold=1.0)(images(40))
    assert caplog.messages == ["captioner 'image_tags': 3 of 3 texts are empty"]


def test_hq_images_are_captioned_once_as_a_whole(hq_folder, tagger, cache) -> None:
    shown = []
    writes = captions("image_tags", tagger, threshold=0)
    real = writes._captioner
    writes._captioner = lambda image: (shown.append(image.shape), real(image))[1]
    common = {"scale": 4, "crop": 16, "degradation": LIGHT, "prompts": "captioner", "captions": writes}
    data = open_data(hq_folder, **common, caption_hq=True)
    first = data.batch(0, range(6))
    assert shown == [(1, 3, 48, 48)] * 3 and len(list(cache.rglob("*.txt"))) == 3
    by_path = dict(zip(first.paths, first.prompts, strict=True))
    assert data.batch(0, range(6, 12)).prompts == tuple(by_path[path] for path in data.batch(0, range(6, 12)).paths)
    held_out = next(data.validation())
    assert shown[3:] == [(1, 3, 12, 12)] and held_out.prompts == writes(held_out.lq)  # HQ is not there at inference


def test_a_run_captions_and_what_follows_does_the_same(commands, tiny_base, hq_folder, tagger, tmp_path, cache) -> None:
    data = {"captioner": "image_tags", "captioner_options.model": tagger, "captioner_options.device": "cpu"}
    data |= {"prompts": "captioner", "prompt_suffix": "sharp", "validation": hq_folder, "caption_from": "hq"}
    more = [part for key, value in data.items() for part in ("--set", f"data.{key}={value}")]
    answer = commands.finetune(tiny_base, hq_folder, tmp_path / "run", *more)
    assert answer.code == 0, answer.err
    kept = load_recipe(str(tmp_path / "run" / RECIPE), {}, []).data
    assert (kept.captioner, kept.captioner_options["model"], kept.prompt_suffix) == ("image_tags", str(tagger), "sharp")
    answer = commands("evaluate", hq_folder, "--run", tmp_path / "run", "--device", "cpu", "-o", tmp_path / "found")
    assert answer.code == 0 and "prompts: captioner" in answer.out, answer.err
    own = max((tmp_path / "run" / "validation").glob("*.json")).read_text()
    there = (tmp_path / "found" / "evaluation.json").read_text()
    scores = [[one["psnr"]["scores"] for one in json.loads(text)["systems"].values()] for text in (own, there)]
    assert scores[0] == scores[1]
    kept = set(cache.rglob("*.txt"))
    assert len(kept) == 7  # of three HQ images, of three LQ images of validation, and of one that was tried before
    answer = commands("upscale", hq_folder, "--run", tmp_path / "run", "--device", "cpu", "-o", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert set(cache.rglob("*.txt")) == kept  # these were seen as HQ images


# ---- what is refused ----


def spoiled(folder: Path, target: Path, *names: str) -> Path:
    shutil.copytree(folder, target)
    for name in names:
        (target / name).unlink()
    return target


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        (
            "image_to_text",
            "nobody/nothing",
            "is neither a folder here nor in the Hub's cache, and the Hub cannot be re",
        ),
        ("image_to_text", "{none}", "no such folder, and not a Hub id"),
        ("image_to_text", "{empty}", "no config.json in it"),
        ("image_to_text", "{tagger}", "does not load as AutoModelForImageTextToText: "),
        ("image_tags", "{git_writer}", "does not load as AutoModelForImageClassification: "),
        ("image_to_text", "{no_tokenizer}", "captioner's model"),
        ("image_to_text", "{no_processor}", "does not load as AutoImageProcessor"),
        ("image_tags", "{no_weights}", "does not load as AutoModelForImageClassification"),
        ("image_tags", "{no_head}", "lacks 2 weights of ViTForImageClassification (classifier.bias)"),
    ],
)
def test_models_that_do_not_work_are_one_line(name, model, message, git_writer, tagger, tmp_path, contacted) -> None:
    (tmp_path / "empty").mkdir()
    places = {"none": tmp_path / "none", "empty": tmp_path / "empty", "tagger": tagger, "git_writer": git_writer}
    places["no_tokenizer"] = spoiled(git_writer, tmp_path / "1", "tokenizer.json", "tokenizer_config.json")
    places["no_processor"] = spoiled(git_writer, tmp_path / "2", "preprocessor_config.json")
    places["no_weights"] = spoiled(tagger, tmp_path / "3", "model.safetensors")
    places["no_head"] = spoiled(tagger, tmp_path / "4")
    state = load_file(tagger / "model.safetensors")
    body = {key: value for key, value in state.items() if not key.startswith("classifier")}
    save_file(body, places["no_head"] / "model.safetensors", {"format": "pt"})
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        Captions(name, {"model": model.format(**places)})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert time.monotonic() - begun < 10 and not contacted


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"captioner": "image_tags"}, "'model' is missing"),
        ({"captioner": "image_tags", "captioner_options.modle": "x"}, "unknown key 'modle': did you mean 'model'?"),
        ({"captioner": "image_tags", "captioner_options": "{model: x/y, threshold: 2}"}, "'threshold' is 2"),
        ({"captioner": "strangers:shade", "captioner_options.model": "x"}, "unknown key 'model'"),
        ({"captioner": "image_tag"}, "unknown captioner 'image_tag': did you mean 'image_tags'?"),
    ],
)
def test_options_are_checked(data, message, refused, tiny_base, hq_folder, tmp_path) -> None:
    chosen = {"prompts": "captioner", **data}
    more = [part for key, value in chosen.items() for part in ("--set", f"data.{key}={value}")]
    assert message in refused.finetune(tiny_base, hq_folder, tmp_path / "run", *more)


def test_one_bad_device(tagger) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device cuda is not available here"):
            captions("image_tags", tagger, device="cuda")
