"""The card of a run: read by the Hub's own classes, true to the run, and honest about what it does not know."""

import json
from typing import Any

import pytest
import yaml
from _publishing import BASE, go_offline
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rewardsr import UserError
from rewardsr.hub.card import build_card, check_card
from rewardsr.run_folder import LORA, OUR_HEADER


def changed(run, **changes: Any) -> None:
    """Change the recipe."""
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


def reheaded(run, **changes: Any) -> None:
    """Change what the LoRA's header says."""
    with safe_open(run / LORA, framework="pt") as file:
        about = json.loads(file.metadata()[OUR_HEADER]) | changes
    save_file(load_file(run / LORA), run / LORA, {OUR_HEADER: json.dumps(about)})


def front(run, **options: Any) -> Any:
    """Front matter of the card."""
    return ModelCard(build_card(run, "ada/crisp", **options)).data


def test_the_hubs_classes_read_it(run) -> None:
    text = build_card(run, "ada/crisp", base_model=BASE, datasets=["ada/photos"], licence="openrail++")
    check_card(text, {"samples/validation.png"})
    data = ModelCard(text).data
    assert data.base_model == BASE and data.base_model_relation == "adapter"
    assert data.library_name == "diffusers" and data.pipeline_tag == "image-to-image"
    assert {"rewardsr", "super-resolution", "lora", "osediff", "gdpo"} <= set(data.tags)
    assert data.license == "openrail++" and data.datasets == ["ada/photos"] and data.metrics == ["psnr"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("psnr", 21.75)  # of the last validation


def test_it_tells_what_the_run_did(run) -> None:
    text = build_card(run, "ada/crisp")
    assert "| psnr" in text and "+1.2500 [-8.2797, +10.7797]" in text  # mean difference and interval
    assert "rank 2, alpha 8" in text and "| `psnr` | 1 | Apache-2.0 |" in text
    assert 'rewardsr.load_lora(adapter, "ada/crisp", scale=1.0)' in text
    assert f'pipe.load_lora_weights("ada/crisp", weight_name="{LORA}")' in text and "--format kohya" in text
    assert "2603.16769" in text and "![" in text and "$" not in text and "===" not in text
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block)["steps"] == 2


def test_a_local_base_is_not_taken_for_one_on_the_hub(hub, run) -> None:
    hub.add("models/sd21", **{"README.md": b"---\nlicense: mit\n---\n"})
    changed(run, base="models/sd21")  # looks like a Hub id, but the LoRA's header says that it was a folder
    data = front(run)
    assert data.base_model is None and not hub.requests
    assert data.license == "other" and data.license_name == "that-of-the-base-model"


@pytest.mark.parametrize(
    ("content", "licence"),
    [
        ("---\nlicense: openrail++\n---\n# Base\n", "openrail++"),
        ("# Base without front matter\n", "other"),
        ("---\nlicense: [\n---\n", "other"),
        ("---\nlicense: [a, b]\n---\n", "other"),
    ],
)
def test_the_licence_of_the_bases_card_is_carried_over(run, tmp_path, content, licence) -> None:
    (tmp_path / "README.md").write_text(content)
    changed(run, base=str(tmp_path))
    assert front(run).license == licence


def test_the_licence_of_a_base_on_the_hub(hub, run, monkeypatch) -> None:
    model = hub.add(BASE, **{"README.md": b"---\nlicense: openrail++\n---\n"})
    changed(run, base=BASE)
    reheaded(run, base={"id": BASE, "revision": model.refs["main"]})
    assert (front(run).base_model, front(run).license) == (BASE, "openrail++")
    go_offline(monkeypatch)
    assert front(run).license == "openrail++", "from the cache"
    reheaded(run, base={"id": BASE, "revision": "0" * 40})
    assert front(run).license == "other", "not in the cache"


@pytest.mark.parametrize(
    ("stated", "licence", "name"),
    [("mit", "mit", None), ("S-Lab License 1.0 (non-commercial)", "other", "s-lab-license-1.0-non-commercial")],
)
def test_what_the_adapter_states_of_its_weights_goes_first(run, tmp_path, stated, licence, name) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: openrail++\n---\n")
    changed(run, base=str(tmp_path))
    reheaded(run, licence=stated)
    data = front(run)
    assert (data.license, data.license_name) == (licence, name)
    assert f"falls under the base's licence: {stated}." in build_card(run, "ada/crisp")
    assert front(run, licence="openrail++").license == "openrail++"


def test_without_validation_it_says_so(run) -> None:
    for path in (run / "validation").iterdir():
        path.unlink()
    text = build_card(run, "ada/crisp")
    assert "nothing was measured" in text and "![" not in text
    assert ModelCard(text).data.eval_results is None
    check_card(text, set())


@pytest.mark.parametrize(
    ("recipe", "said", "unsaid"),
    [
        ({"adapter": "stablesr"}, ["no pipeline for StableSR"], ["load_lora_weights", "rewardsr.wrap"]),
        ({"adapter": "seesr", "trainer": "rfsr"}, ["file of their own", "2412.03268"], ["2603.16769", "kohya"]),
        ({"trainer": "mine:Trainer"}, ["load_lora_weights"], ["Citation"]),
    ],
)
def test_pipelines_and_methods_have_their_own_words(run, recipe, said, unsaid) -> None:
    changed(run, **recipe)
    text = build_card(run, "ada/crisp")
    assert all(words in text for words in said) and not any(words in text for words in unsaid)


def test_damage_is_named(run) -> None:
    newest = run / "validation" / "step-00000002.json"
    newest.write_text(json.dumps({"rewards": 3}))
    with pytest.raises(UserError, match=r"step-00000002\.json' is damaged"):
        build_card(run, "ada/crisp")
