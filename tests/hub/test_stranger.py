"""A run straight from the Hub is a stranger's: it chooses neither code nor files of the machine that it is used on."""

import sys
from pathlib import Path

import pytest
import yaml
from _publishing import REPO

from rewardsr import plugins
from rewardsr.errors import UserError
from rewardsr.pipelines import open_run

CODE = ["spy:", "spy:Name", " spy:Name", "spy:Name.deeper", ".spy:Name", "torch:hub", "spy\uff1aName", "spy"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, which holds a module that leaves a trace where it is imported."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "spy.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('trace').touch()\nName = print\n"
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    assert not (folder / "trace").exists() and "spy" not in sys.modules


@pytest.fixture
def published(hub, run):
    """Puts the run on the Hub with changes of its recipe, as somebody may who has not used `push`."""

    def change(**changes: object) -> None:
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        data = {**recipe["data"], **changes.pop("data", {})}  # type: ignore[dict-item]
        files = {name: (run / name).read_bytes() for name in ("pytorch_lora_weights.safetensors", "recipe.yaml")}
        files["recipe.yaml"] = yaml.safe_dump({**recipe, "data": data, **changes}).encode()
        hub.repositories.pop(("model", REPO), None)
        hub.add(REPO, **files)

    return change


def refusal(**given) -> str:
    with pytest.raises(UserError) as caught:
        open_run(REPO, device="cpu", **given)
    return str(caught.value)


@pytest.mark.parametrize("name", CODE)
def test_plugins_are_registered_ones_wherever_they_are_named(here, published, tiny_base, tiny_seesr, name) -> None:
    places = {
        "adapter": {"adapter": name},
        "trainer": {"trainer": name},
        "degradation": {"data": {"degradation": {"name": name}}},
        "captioner": {"data": {"captioner": name}},
        "tagger": {"adapter": "seesr", "adapter_options": {"tagger": name}},
    }
    if ":" in name:  # else it is an id of pyiqa, or of none
        places |= {"reward": {"rewards": [{"name": name}]}, "guard": {"guards": [name]}}
    for what, changes in places.items():
        published(**changes)
        line = refusal(base=tiny_seesr if what == "tagger" else str(tiny_base))
        assert name.strip() in line and ("names code" in line if ":" in name else "unknown" in line), line


def test_plugins_that_the_user_names_beside_it_may_be_code(published, tiny_seesr, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    published(adapter="seesr", adapter_options={"tagger": "webbrowser:open"})
    with pytest.raises(UserError, match="LoRA"):  # the tagger is made by then
        open_run(REPO, base=tiny_seesr, options=["tagger=stranger_package:Means"], device="cpu")
    with plugins.registered_only("a run", ["stranger_package:Means"]):
        assert plugins.resolve("taggers", "stranger_package:Means")
        with pytest.raises(UserError, match="names code"):
            plugins.resolve("taggers", "stranger_package:Other")


def test_no_file_of_this_machine_is_named(here, published, tiny_base) -> None:
    (here / "weights.pkl").write_bytes(b"\x80\x04.")
    (here / "inside").mkdir()
    places = ["weights.pkl", str(here / "weights.pkl"), "~/weights.pkl", "../here/weights.pkl", "inside/../weights.pkl"]
    places += ["./weights.pkl", "C:\\weights.pkl", "\\\\server\\weights.pkl", "https://example.org/w.pkl", "inside"]
    for place in places:
        for value in (place, [place], {"deep": [{"er": place}]}):
            published(adapter_options={"noise_t": 250, "weights": value})
            assert "names a place on a disk" in refusal(base=str(tiny_base)), place
    published(data={"degradation": {"name": "light", "kernel": str(here / "weights.pkl")}})
    assert "degradation option kernel" in refusal(base=str(tiny_base))
    captioner = {"captioner": "image_tags", "captioner_options": {"model": str(here / "inside")}}
    published(data={"prompts": "captioner", **captioner})
    assert "captioner option model" in refusal(base=str(tiny_base))


def test_a_local_base_is_said_again_where_it_is_used(here, published, tiny_base) -> None:
    (here / "user").mkdir()
    (here / "user" / "base").symlink_to(tiny_base)
    for base in (str(tiny_base), "user/base", "tiny", "../x", "~/x", "C:\\x"):
        published(base=base)
        assert "--base PATH" in refusal()
        adapter, recipe = open_run(REPO, base=str(tiny_base), device="cpu")
        assert adapter.base_model.id == str(tiny_base) and recipe is not None
    published(base=str(tiny_base), adapter_options={"noise_t": 250, "weights": "/etc/passwd"})
    adapter, _ = open_run(REPO, base=str(tiny_base), options=["weights=null"], device="cpu")
    assert adapter.options.weights is None, "an option that is given here replaces the recipe's"
