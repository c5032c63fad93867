"""The card of a run: read by the Hub's own classes, true to the run, and honest about what it does not know."""

import json

import pytest
import yaml
from _publishing import BASE, make_run
from huggingface_hub import ModelCard

from rewardsr import UserError, load_adapter, lora
from rewardsr.hub.card import build_card, check_card


@pytest.fixture
def run(tmp_path, tiny_base):
    return make_run(tmp_path / "run", tiny_base)


def changed(run, **changes) -> None:
    path = run / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))


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
    assert "| psnr" in text and "+1.2500" in text and "0.1000" in text  # mean difference and interval
    assert "rank 2, alpha 8" in text and "| `psnr` | 1 | Apache-2.0 |" in text
    assert 'rewardsr.load_lora(adapter, "ada/crisp", scale=1.0)' in text
    assert 'pipe.load_lora_weights("ada/crisp"' in text and "--format kohya" in text
    assert "2603.16769" in text and "![" in text
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block)["steps"] == 2


def test_a_local_base_is_not_taken_for_one_on_the_hub(run) -> None:
    changed(run, base="models/sd21")  # looks like a Hub id, but the LoRA's header says that it was a folder
    data = ModelCard(build_card(run, "ada/crisp")).data
    assert data.base_model is None
    assert data.license == "other" and data.license_name == "that-of-the-base-model"


def test_the_licence_of_the_bases_card_is_carried_over(run, tiny_base, tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    changed(run, base=str(base))
    for content, licence in (
        ("---\nlicense: openrail++\n---\n# Base\n", "openrail++"),
        ("# Base without front matter\n", "other"),
        ("---\nlicense: [\n---\n", "other"),
        ("---\nlicense: [a, b]\n---\n", "other"),
    ):
        (base / "README.md").write_text(content)
        assert ModelCard(build_card(run, "ada/crisp")).data.license == licence


@pytest.mark.parametrize(
    ("stated", "licence", "name"),
    [("mit", "mit", None), ("S-Lab License 1.0 (non-commercial)", "other", "s-lab-license-1.0-non-commercial")],
)
def test_what_the_adapter_states_of_its_weights_goes_first(run, tiny_base, tmp_path, stated, licence, name) -> None:
    adapter = load_adapter("osediff", str(tiny_base), noise_t=250)
    adapter.licence = stated
    lora.attach(adapter, rank=2)
    lora.save(adapter, run)
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")
    changed(run, base=str(base))
    text = build_card(run, "ada/crisp")
    data = ModelCard(text).data
    assert (data.license, data.license_name) == (licence, name)
    assert f"falls under the base's licence: {stated}." in text
    assert ModelCard(build_card(run, "ada/crisp", licence="openrail++")).data.license == "openrail++"


def test_stablesr_has_no_pipeline_to_load_it_into(run) -> None:
    changed(run, adapter="stablesr", adapter_options={})
    text = build_card(run, "ada/crisp")
    assert "no pipeline for StableSR" in text and "load_lora_weights" not in text and "rewardsr.wrap" not in text


def test_without_validation_it_says_so(run) -> None:
    for path in (run / "validation").iterdir():
        path.unlink()
    text = build_card(run, "ada/crisp")
    assert "nothing was measured" in text and "![" not in text
    assert ModelCard(text).data.eval_results is None
    check_card(text, set())


def test_rfsr_and_seesr_have_their_own_words(run) -> None:
    changed(run, trainer="rfsr", adapter="seesr")
    text = build_card(run, "ada/crisp")
    assert "2412.03268" in text and "2603.16769" not in text
    assert "file of their own" in text and "kohya" not in text


def test_damage_is_named(run) -> None:
    newest = run / "validation" / "step-00000002.json"
    newest.write_text(json.dumps({"rewards": 3}))
    with pytest.raises(UserError, match=r"step-00000002\.json' is damaged"):
        build_card(run, "ada/crisp")
