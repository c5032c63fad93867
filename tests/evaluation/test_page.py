"""`report.html` as a file: what it says, what it holds of runs on the disk, and that nothing of others runs in it."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import DOWN, EVEN, NASTY, RECIPE, SLIGHTLY_DOWN, UP, compared, encoded, lines, page_of_two, viewed
from PIL import Image

from rewardsr.errors import UserError
from rewardsr.evaluation.cast import Cast, OffsetTest
from rewardsr.evaluation.page import EvaluationView, Page, Picture, RunView, check_place, read_page, write_page
from rewardsr.evaluation.page.curves import MOST_POINTS, charts
from rewardsr.evaluation.page.images import chosen, fitted, merged
from rewardsr.evaluation.page.verdict import judge
from rewardsr.evaluation.report import Evaluation


class Tags(HTMLParser):
    """Elements of a page with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.found[-1][0] if self.found else "", []).append(data)


def test_names_of_others_stay_text(tmp_path) -> None:
    text = write_page(tmp_path / "report.html", page_of_two()).read_text()
    tags = Tags(text)
    assert [tag for tag, _ in tags.found].count("script") == 2, "the data and the page's own"
    assert not any(name.startswith("on") for _, attributes in tags.found for name in attributes)
    assert not [attributes for tag, attributes in tags.found if tag == "img" and attributes.get("src")]
    data = json.loads("".join(tags.texts["script"]).split("(() => {")[0])
    assert data["pictures"][0]["name"] == NASTY and data["systems"][0]["metrics"][1][0] == NASTY
    assert any(attributes.get("data-picture") == "b.png" for _, attributes in tags.found)
    policy = next(
        attributes["content"] for tag, attributes in tags.found if tag == "meta" and "http-equiv" in attributes
    )
    assert policy is not None and "default-src 'none'" in policy and "unsafe" not in policy


def test_it_asks_for_nothing(tmp_path) -> None:
    text = write_page(tmp_path / "report.html", page_of_two()).read_text()
    code = re.sub(r"data:image/\w+;base64,[\w+/=]+", "", text).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|<link rel=.stylesheet", code)


@pytest.mark.parametrize(
    ("rewards", "tone", "headline"),
    [
        ({"psnr": UP, "ssim": EVEN}, "good", "Better: psnr"),
        ({"psnr": UP, "ssim": DOWN}, "bad", "Rewards rose, but ssim fell: reward hacking?"),
        ({"psnr": UP, "ssim": DOWN, "lpips": UP}, "mixed", "Mixed: up psnr, lpips; down ssim"),
        ({"psnr": DOWN}, "bad", "Worse: psnr"),
        ({"psnr": EVEN}, "none", "No change that the intervals settle"),
        ({"psnr": compared(0.3)}, "none", "One image settles nothing"),
    ],
)
def test_the_verdict_says_what_the_intervals_show(rewards, tone, headline) -> None:
    names = ["a", "b", "c"][: len(next(iter(rewards.values())).base)]
    page = Page("", [RunView("run", RECIPE, {}, [])], [viewed("run", names, **rewards)])
    found = judge(page, page.evaluations[0])
    assert (found.tone, found.headline) == (tone, headline)


@pytest.mark.parametrize(
    ("margin", "rewards", "tone", "headline"),
    [
        (0.1, {"psnr": UP, "ssim": SLIGHTLY_DOWN}, "good", "Better: psnr"),
        (0.004, {"psnr": UP, "ssim": SLIGHTLY_DOWN}, "bad", "Rewards rose, but ssim fell: reward hacking?"),
        (0.1, {"psnr": UP, "ssim": DOWN}, "bad", "Rewards rose, but ssim fell: reward hacking?"),
        (0.1, {"psnr": EVEN, "ssim": SLIGHTLY_DOWN}, "none", "No gain; down within its margin: ssim"),
        (0.1, {"psnr": DOWN, "ssim": SLIGHTLY_DOWN}, "bad", "Worse: psnr"),
        (0.001, {"psnr": UP, "ssim": EVEN}, "good", "Better: psnr"),
    ],
)
def test_a_fall_within_its_margin_is_shown_and_does_not_count(tmp_path, margin, rewards, tone, headline) -> None:
    run = RunView("run", RECIPE, {}, [])
    page = Page("", [run], [viewed(margins={"ssim": margin}, **rewards)])
    found = judge(page, page.evaluations[0])
    assert (found.tone, found.headline) == (tone, headline)
    said = "Down within the margin, which does not count: ssim −0.0050 [−0.0075, −0.0025] (margin 0.1)."
    small = rewards["ssim"] is SLIGHTLY_DOWN and margin == 0.1
    assert (said in found.sentences) == small
    text = write_page(tmp_path / "report.html", page).read_text()
    row = text[text.index('<th scope="row">ssim') :].partition("</tr>")[0]
    assert ('class="even"' in row and "within its margin of 0.1<" in row) == small
    assert (f"beyond its margin of {margin:g}<" in row) == headline.startswith("Rewards rose")
    assert "a mean that falls by no more does not count as worse" in text


def test_the_table_says_what_it_compares_with(tmp_path) -> None:
    weak = Evaluation(
        ("a.png", "b.png"), {"strength=0": {"psnr": (1.0, 2.0)}, "strength=1": {"psnr": (2.0, 3.5)}}, 0, 1, "none"
    )
    views = [EvaluationView("strength=1", json.loads(weak.to_json()))]
    assert "Change against strength=0." in write_page(tmp_path / "a.html", Page("", [], views)).read_text()
    assert "Change against the base." in write_page(tmp_path / "b.html", Page("", [], [viewed()])).read_text()


def test_margins_of_a_run_are_those_of_its_log(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "step-00000040.json").write_text(json.dumps(viewed(psnr=UP, ssim=DOWN).content))
    told = [{"psnr": {"difference": 0.1}, "ssim": {"margin": margin}} for margin in (0.5, 0.2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": 40, "validation": one}) + "\n" for one in told))
    page = read_page([tmp_path])
    assert page.evaluations[0].evaluation.margins == {"ssim": 0.2}
    assert "margin" not in json.dumps(charts(page.runs)), "it is no curve"
    (tmp_path / "metrics.jsonl").write_text('{"step": 40, "validation": {"ssim": {"margin": "wide"}}}\n')
    with pytest.raises(UserError, match="is not an evaluation"):
        read_page([tmp_path])


def test_the_verdict_knows_cast_and_control() -> None:
    page = page_of_two()
    gained, control = (judge(page, view) for view in page.evaluations)
    assert gained.tone == "good" and "Gains beyond its drift: all." in gained.sentences[1]
    assert gained.worst == "b.png" and gained.sentences[-1].startswith("Step 3: stopped")
    assert control.tone == "none" and control.headline.startswith("Control with advantages at random: no change")
    drifting = dataclasses.replace(
        page, evaluations=[page.evaluations[0], viewed("control", psnr=compared(0.2, 0.3, 0.4))]
    )
    assert judge(drifting, drifting.evaluations[0]).headline == "No more than its control"
    cast = Cast((0.1,), "these images", {"psnr": OffsetTest(UP, compared(0.18, 0.09, 0.14), EVEN, EVEN)})
    cast_page = Page("", [], [viewed("lora", cast=cast, psnr=UP)])
    found = judge(cast_page, cast_page.evaluations[0])
    assert found.headline == "Mostly a global cast" and found.tone == "bad"
    assert "gives 91 % of psnr's gain" in found.sentences[1]


def test_a_reward_that_only_watches_is_none_that_steers() -> None:
    recipe = "rewards:\n- {name: ssim, weight: 0.0}\n- {name: psnr, weight: 0.5}\n- {name: detail}\n"
    assert RunView("run", recipe, {}, []).rewards == ("psnr", "detail")


def test_the_cast_test_has_its_section(tmp_path) -> None:
    cast = Cast((0.1, 0.2), "two <images>", {"psnr": OffsetTest(UP, UP, EVEN, EVEN)})
    text = write_page(tmp_path / "a.html", Page("", [], [viewed("lora", cast=cast, psnr=UP)])).read_text()
    assert 'id="cast"' in text and "two &lt;images&gt;" in text and "100 %" in text
    assert 'id="cast"' not in write_page(tmp_path / "b.html", page_of_two()).read_text()


def test_settings_that_differ_stand_side_by_side(tmp_path) -> None:
    text = write_page(tmp_path / "report.html", page_of_two()).read_text()
    table = text[text.index("Settings that differ") :].partition("</table>")[0]
    assert "trainer_options.shuffle_advantages" in table and "<td>false</td><td>true</td>" in table
    assert "steps" not in table


def test_curves_are_sorted_thinned_and_whole() -> None:
    many = [{"step": step, "loss": float(step), "odd/name": None, "said": "text"} for step in range(1, 1001)]
    found = charts([RunView("run", RECIPE, {}, [*many, *lines()[40:]])])
    assert [chart["title"] for chart in found] == ["psnr (validation)", "loss"]
    validation, loss = (chart["series"][0] for chart in found)
    assert validation["points"] == [[20, 0.6, 0.55, 0.65], [40, 0.6, 0.55, 0.65]] and validation["base"] == 0.5
    assert found[0]["meaning"] == "reward: trained on"
    assert len(loss["points"]) <= MOST_POINTS and loss["every"] == 4
    assert loss["points"][0] == [4, 2.5] and loss["points"][-1] == [1000, 998.5]


def test_pictures_stay_within_their_bytes() -> None:

    def noisy() -> bytes:
        content = io.BytesIO()
        Image.effect_noise((300, 300), 80).convert("RGB").save(content, "PNG")
        return content.getvalue()

    pictures = [Picture(str(place), {"base": noisy()}) for place in range(6)]
    whole, said = fitted(pictures, 10**7)
    assert whole == pictures and said == "as they were written"
    smaller, said = fitted(pictures, 350_000)
    assert len(smaller) == 6 and "quality" in said and sum(len(one.images["base"]) for one in smaller) <= 350_000
    few, said = fitted(pictures, 1_000)
    assert len(few) == 1 and "left out" in said
    large = Picture("large", {"LQ": encoded((9, 9, 9), 512), "base": encoded((99, 9, 9), 2048)})
    [cut], said = fitted([large], 10**7)
    sizes = [Image.open(io.BytesIO(content)).size for content in cut.images.values()]
    assert sizes == [(256, 256), (1024, 1024)] and said.startswith("cut to 1024 pixels")
    with pytest.raises(UserError, match="picture 'x' \\(base\\) is damaged"):
        fitted([Picture("x", {"base": b"\x89PNG and no more"})])
    with pytest.raises(UserError, match="no PNG, JPEG or WebP"):
        fitted([Picture("x", {"base": b"<svg onload='x'/>"})])


def test_pictures_shown_are_those_that_lost_and_won_most() -> None:
    names = [f"{place}.png" for place in range(9)]
    view = viewed("run", names, psnr=compared(*(0.1 * place for place in (4, 0, 1, 2, 3, 8, 5, 6, 7))))
    pictures = [Picture(name, {"base": b""}) for name in names]
    assert [picture.name for picture in chosen(pictures, view, 4)] == ["1.png", "2.png", "5.png", "8.png"]


def test_pictures_of_runs_share_what_is_equal() -> None:
    lq, base, other, one, two = (encoded((shade, 0, 0)) for shade in range(50, 100, 10))
    [found] = merged(
        {
            "a": [Picture("x", {"LQ": lq, "base": base, "tuned": one}, {"tuned": {"psnr": 1.0}})],
            "b": [Picture("x", {"LQ": lq, "base": other, "tuned": two, "HQ": lq}, {"tuned": {"psnr": 2.0}})],
        }
    )
    assert list(found.images) == ["LQ", "base", "base of b", "a", "b", "HQ"]
    assert found.scores == {"a": {"psnr": 1.0}, "b": {"psnr": 2.0}}


def test_only_a_report_is_written_over(tmp_path) -> None:
    page = page_of_two()
    path = write_page(tmp_path / "report.html", page)
    assert write_page(path, page) == path
    (tmp_path / "mine.html").write_text("<p>mine")
    with pytest.raises(UserError, match="is no report of rewardsr"):
        write_page(tmp_path / "mine.html", page)
    assert (tmp_path / "mine.html").read_text() == "<p>mine"
    with pytest.raises(UserError, match=r"let the name end in \.html"):
        check_place(tmp_path / "report.png")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine.html", "report.html"]


def test_what_is_no_run_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="neither the folder of a run"):
        read_page([tmp_path])
    with pytest.raises(UserError, match="no such run or evaluation"):
        read_page([tmp_path / "absent"])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="holds no evaluation"):
        read_page([tmp_path / "x.json"])
    view = viewed()
    (tmp_path / "x.json").write_text(json.dumps(view.content))
    assert read_page([tmp_path / "x.json"]).evaluations == [EvaluationView("x", view.content)]


def test_a_run_that_was_cut_off_is_shown_as_far_as_it_came(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "not_finite": "loss"}\n{"step": 2, "lo')
    [run] = read_page([Path(tmp_path)]).runs
    assert run.notes == ["Step 1: not finite: loss", "The run ends at step 1 of 40."]
    assert run.rewards == ("psnr",) and len(run.steps) == 1
