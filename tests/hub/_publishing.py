"""What the tests of the Hub share: a finished run without training, and the client pointed at a Hub on 127.0.0.1."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from hub_server import Hub, serving

from rewardsr import lora, run_folder
from rewardsr.data.images import write_image
from rewardsr.errors import UserError
from rewardsr.evaluation.report import Evaluation
from rewardsr.hub import connection
from rewardsr.hub.publish import Pushed, push
from rewardsr.pipelines import load_adapter
from rewardsr.storage import write_text

REPO, TOKEN, OTHER = "ada/tiny-sr", "hf_ada", "hf_bob"
BASE = "stabilityai/stable-diffusion-2-1-base"
CARD = f"""---
license: apache-2.0
base_model: {BASE}
base_model_relation: adapter
library_name: diffusers
pipeline_tag: image-to-image
tags: [rewardsr, super-resolution, lora]
---
# Tiny

![before and after](samples/validation.png)
"""
SENT = {
    "README.md",
    run_folder.LORA,
    "recipe.yaml",
    "metrics.jsonl",
    "samples/validation.json",
    "samples/validation.png",
}


def make_run(folder: Path, base: Path) -> Path:
    """A run of two steps as training leaves it."""
    adapter = load_adapter("osediff", str(base), noise_t=250)
    lora.attach(adapter, rank=2)
    for name, parameter in lora.parameters(adapter).items():  # a fresh LoRA changes nothing
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    lora.save(adapter, folder)
    recipe = {"base": str(base), "rewards": [{"name": "psnr"}], "data": {"train": "images"}, "output": "run"}
    write_text(folder / "recipe.yaml", json.dumps(recipe | {"steps": 2}))
    write_text(folder / "metrics.jsonl", '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    for step in (1, 2):
        scores = {"base": {"psnr": (20.0, 21.0)}, "tuned": {"psnr": (20.0 + step, 21.5)}}
        found = Evaluation(("a.png", "b.png"), scores, seed=0, draws_per_image=1, color_fix="none")
        write_text(folder / f"validation/step-{step:08d}.json", found.to_json())
        write_image(torch.full((3, 8, 8), step / 4), folder / f"validation/step-{step:08d}.png")
    write_text(folder / "checkpoints/step-00000002/optimiser.safetensors", "state")
    return folder


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A Hub that ada and bob have accounts at, ada is logged in to, and this process takes for the Hub.

    What the client has read from the environment when it was imported is changed in place; it waits for nothing
    between its attempts.
    """
    with serving() as hub:
        hub.add_token(TOKEN, "ada", orgs={"lab": "write", "club": "read"})
        hub.add_token(OTHER, "bob")
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name, text in {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}.items():
            monkeypatch.setenv(name, text)
        impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
        for module in ("utils._http", "file_download"):
            monkeypatch.setattr(f"huggingface_hub.{module}.time", impatient)
        connection.online.cache_clear()
        try:
            yield hub
        finally:
            connection.online.cache_clear()
            huggingface_hub.utils.close_session()  # whose connections end here


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    """Environment of another process that takes this for the Hub, with a cache of its own."""
    return os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HOME": str(home),
    }


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with HF_HUB_OFFLINE=1 from the start."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    connection.online.cache_clear()


def sent(run: Path, **options: Any) -> Pushed:
    """Push a run with the card above."""
    return push(run, REPO, card=CARD, **options)


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 400, line
    return line
