"""How recipes name images: a path as ever, mappings, lists of both; and what does not go together there."""

from pathlib import Path

import pytest

from rewardsr.errors import UserError
from rewardsr.hub.content import shortened_recipe
from rewardsr.options import parse
from rewardsr.train.recipe import DataRecipe, Recipe, SourceRecipe, differences


def read(train: object, **more: object) -> DataRecipe:
    return parse(DataRecipe, {"train": train, **more}, "data")


def whole(train: object, **more: object) -> Recipe:
    top = {"base": "b", "rewards": [{"name": "psnr"}], "output": "run", "steps": 3}
    return parse(Recipe, {**top, "data": {"train": train, **more}}, "test")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("photos", "photos"),
        (Path("photos"), "photos"),
        (["photos"], "photos"),
        ({"path": "photos"}, "photos"),
        (["photos", "list.txt"], ["photos", "list.txt"]),
        ({"path": "photos", "layout": "lq"}, {"path": "photos", "layout": "lq"}),
        (
            [{"path": "a", "probability": 0.5}, {"dataset": "user/b", "probability": 0.5}],
            [{"path": "a", "probability": 0.5}, {"dataset": "user/b", "probability": 0.5}],
        ),
    ],
)
def test_sources_are_kept_as_they_are_written(given, kept) -> None:
    made = read(given, validation=given if "probability" not in str(given) else None)
    assert made.model_dump(mode="json")["train"] == kept
    assert read(kept).train == made.train
    if "probability" not in str(given):
        assert made.model_dump(mode="json")["validation"] == kept
    assert read("photos").model_dump(mode="json")["validation"] is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": []}, "'train' is []: "),
        ({"train": None}, "'train' is []: "),
        ({"train": [3]}, "'train.0' is 3: "),
        ({"train": [{"pat": "x"}]}, "unknown key 'train.0.pat': did you mean 'path'?"),
        ({"train": {"path": "x", "dataset": "y"}}, "expected one of path and dataset"),
        ({"train": {"layout": "lq"}}, "expected one of path and dataset"),
        ({"train": {"path": "x", "split": "train"}}, "split is of a data set, and this is a path"),
        ({"train": {"dataset": "x", "layout": "pairs"}}, "a data set holds single images, hq or lq"),
        ({"train": {"path": "x", "layout": "tiles"}}, "'train.0.layout' is 'tiles': "),
        ({"train": {"path": "x", "probability": 0}}, "'train.0.probability' is 0: "),
        ({"train": [{"path": "x", "probability": 0.5}, "y"]}, "a probability of each source, or of none"),
        (
            {"train": [{"path": "x", "probability": 0.5}]},
            "a probability of each source, or of none, and 1 as their sum",
        ),
        ({"train": "x", "validation": {"path": "x", "probability": 1}}, "every held-out image is seen"),
        ({"train": "x", "prompt_suffix": "sharp"}, "prompt_suffix follows a text, but prompts is 'adapter'"),
        ({"train": "x", "captioner_options": {"a": 1}}, "captioner_options are set, but captioner is not"),
        ({"train": "x", "caption_from": "hq"}, "caption_from is 'hq', but prompts is not 'captioner'"),
        ({"train": "x", "max_unreadable": 2}, "'max_unreadable' is 2: "),
        ({"train": "x", "prompt_dropout": -1}, "'prompt_dropout' is -1: "),
    ],
)
def test_what_does_not_go_together_is_named(data, message) -> None:
    with pytest.raises(UserError) as caught:
        parse(DataRecipe, data, "data")
    assert message in str(caught.value)


def test_home_folders_and_thirds() -> None:
    assert read("~/photos").train[0].path == str(Path.home() / "photos")
    assert len(read([{"path": name, "probability": 0.333} for name in "abc"]).train) == 3


def test_a_resumed_run_may_find_its_images_elsewhere_and_take_more_unreadable_ones() -> None:
    assert differences(whole("a"), whole(["b", "c"], max_unreadable=0.5, workers=3)) == []
    assert differences(whole("a"), whole("a", too_small="pad")) == ["data"]
    assert differences(whole("a"), whole("a", prompt_dropout=0.1)) == ["data"]


def test_what_is_published_names_no_folder_of_this_machine() -> None:
    made = shortened_recipe(
        whole(
            [{"path": "/home/me/photos", "probability": 0.5}, {"dataset": "user/faces", "probability": 0.5}],
            validation=["data/held_out", "/mnt/disk/list.txt"],
            prompts="captioner",
            captioner="image_tags",
            captioner_options={"model": "/home/me/tagger"},
        )
    )
    assert [source.place for source in made.data.train] == ["photos", "user/faces"]
    assert [source.place for source in made.data.validation] == ["held_out", "list.txt"]
    assert made.data.captioner_options == {"model": "tagger"}
    assert SourceRecipe(dataset="user/faces").place == "user/faces"
