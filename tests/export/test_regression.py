"""A night against an earlier one, with the cause injected: the very stage, cause and word are asserted."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from compression.errors import ArtifactError
from compression.statistics import Interval
from export.regression.compare import Comparison, Regression, compare_runs
from export.regression.judging import ece_change, judged, judged_ratio, unpaired_change
from export.regression.night import open_night
from export.regression.page import write_pages
from export.regression.trend import measured_front, trend
from tests.export.synthetic_nights import RECIPE, VERSIONS, Scene, make_night

FELL = {"student-0.int8-symmetric": 53, "student-0.int8": 53}  # 32 before: 2.1 points
OLD, NEW = "20261125T020000Z-aaaaaaaa", "20261126T020000Z-bbbbbbbb"


def night_after(root: Path, now: Scene, before: Scene | None = None) -> tuple[Regression, Comparison]:
    others = make_night(root, OLD, before)
    regression = compare_runs(make_night(root, NEW, now), {"last good run": others}, rounds=6)
    return regression, regression.comparisons[0]


def words(comparison: Comparison) -> dict[str, str]:
    return {row.what: row.word for row in comparison.rows}


def causes(comparison: Comparison) -> dict[str, list[tuple[str, str]]]:
    return {origin.label: [(c.kind, c.words) for c in origin.causes] for origin in comparison.blame.origins}


def changed(**sections: object) -> dict:
    return {**RECIPE, **sections}


def test_a_library_bump_is_blamed_at_the_stage_where_the_quality_fell(tmp_path: Path) -> None:
    regression, comparison = night_after(tmp_path, Scene(versions={**VERSIONS, "torchao": "0.19.0"}, wrong=FELL))
    assert comparison.blame.sentence == (
        "Accuracy fell by 2.1 points at `quantize/student-0`; its inputs are the same, "
        "torchao went from 0.18.0 to 0.19.0."
    )
    assert causes(comparison) == {"quantize/student-0": [("library", "torchao went from 0.18.0 to 0.19.0")]}
    assert comparison.blame.fell_at == "quantize/student-0"
    assert comparison.blame.followed == (
        "export/student-0.int8-symmetric",
        "export/student-0.int8",
        "evaluate/test",
        "benchmark/cpu",
        "gate/shapes",
    )
    assert [(step.label, step.word) for step in comparison.blame.steps] == [
        ("teacher/residual", "same within chance"),
        ("search/study", "cannot tell"),
        ("distill/student-0", "same within chance"),
        ("quantize/student-0", "worse"),
        ("export/student-0.int8", "worse"),
    ]
    assert words(comparison)["accuracy"] == "worse"
    assert regression.regressed
    assert [(c.kind, c.name, c.before, c.now) for c in comparison.changes] == [
        ("dependency", "torchao", "0.18.0", "0.19.0")
    ]


def test_a_changed_key_of_the_recipe_is_named_with_its_values(tmp_path: Path) -> None:
    recipe = changed(quantize={"kind": "qat", "train": {"epochs": 1}})
    _, comparison = night_after(tmp_path, Scene(recipe=recipe, wrong=FELL))
    assert comparison.blame.sentence == (
        "Accuracy fell by 2.1 points at `quantize/student-0`; its inputs are the same, "
        "quantize.train.epochs went from 4 to 1."
    )
    assert causes(comparison) == {"quantize/student-0": [("recipe", "quantize.train.epochs went from 4 to 1")]}


def test_of_several_changed_keys_each_stage_gets_its_own(tmp_path: Path) -> None:
    recipe = changed(
        quantize={"kind": "qat", "train": {"epochs": 1}}, policy={**RECIPE["policy"], "max_accuracy_drop": 0.5}
    )
    _, comparison = night_after(tmp_path, Scene(recipe=recipe))
    assert causes(comparison) == {"quantize/student-0": [("recipe", "quantize.train.epochs went from 4 to 1")]}
    assert comparison.blame.fell_at is None
    assert comparison.blame.sentence.startswith(
        "Accuracy did not fall beyond chance; the first change is `quantize/student-0`: quantize.train.epochs"
    )


def test_changed_data_are_the_origin_and_nothing_is_compared_sample_by_sample(tmp_path: Path) -> None:
    _, comparison = night_after(tmp_path, Scene(source="more images"))
    assert causes(comparison) == {"data/digits": [("data", "the source data changed")]}
    assert comparison.blame.sentence.startswith(
        "Accuracy did not fall beyond chance; the first change is `data/digits`: the source data changed"
    )
    rows = {row.what: row for row in comparison.rows}
    assert rows["accuracy"].note == "not paired: the data differ"
    assert rows["accuracy"].change is not None
    assert rows["worst class"].word == "cannot tell"
    assert "other test images" in rows["worst class"].note
    assert any("without pairing" in note for note in comparison.notes)
    assert [change.name for change in comparison.changes if change.kind == "data"] == ["digest"]


def test_a_fall_below_changed_data_is_led_back_to_them(tmp_path: Path) -> None:
    wrong = {"student-0.float32": 130, "student-0.int8-symmetric": 132, "student-0.int8": 132}
    _, comparison = night_after(tmp_path, Scene(source="worse images", wrong=wrong))
    assert comparison.blame.fell_at == "distill/student-0"
    assert comparison.blame.sentence == (
        "Accuracy fell by 10.0 points at `distill/student-0`; its inputs differ since `data/digits`: "
        "the source data changed."
    )


def test_changed_code_is_named_with_its_commits(tmp_path: Path) -> None:
    wrong = {"student-0.float32": 80, "student-0.int8-symmetric": 82, "student-0.int8": 82}
    now = Scene(code={"distill": "another loss"}, commit="b" * 40, wrong=wrong)
    _, comparison = night_after(tmp_path, now)
    assert comparison.blame.sentence == (
        "Accuracy fell by 5.0 points at `distill/student-0`; its inputs are the same, "
        "its code changed (aaaaaaaaaa to bbbbbbbbbb)."
    )


def test_nothing_differs_and_nothing_is_blamed(tmp_path: Path) -> None:
    regression, comparison = night_after(tmp_path, Scene())
    assert comparison.blame.sentence == "Nothing differs: every stage gave what it gave before."
    assert comparison.blame.origins == ()
    assert comparison.changes == ()
    assert set(words(comparison).values()) == {"same"}
    assert {row.note for row in comparison.rows} == {"the very same file"}
    assert not regression.regressed


def test_a_library_of_every_stage_is_one_cause_and_not_twenty(tmp_path: Path) -> None:
    _, comparison = night_after(tmp_path, Scene(versions={**VERSIONS, "torch": "2.15.0"}))
    assert list(causes(comparison)) == ["data/digits"]
    assert "torch went from 2.14.1 to 2.15.0" in comparison.blame.sentence


def test_two_origins_are_both_named(tmp_path: Path) -> None:
    now = Scene(code={"teacher": "new"}, versions={**VERSIONS, "torchao": "0.19.0"}, wrong=FELL)
    _, comparison = night_after(tmp_path, now)
    assert list(causes(comparison)) == ["teacher/residual"]
    assert comparison.blame.sentence == (
        "Accuracy fell by 2.1 points at `quantize/student-0`; its inputs differ since `teacher/residual`: "
        "its code changed; besides, torchao went from 0.18.0 to 0.19.0 at `quantize/student-0`."
    )


def test_independent_origins_are_counted(tmp_path: Path) -> None:
    now = Scene(code={"export/teacher-residual.float32": "new", "quantize": "new"})
    _, comparison = night_after(tmp_path, now)
    assert list(causes(comparison)) == ["quantize/student-0", "export/teacher-residual.float32"]
    assert "1 other stage changed of themselves too" in comparison.blame.sentence


def test_a_stage_of_one_run_alone_is_an_origin_with_the_key_that_made_it(tmp_path: Path) -> None:
    recipe = changed(sparsify={"kind": "magnitude"})
    wrong = {"student-0.float32": 70, "student-0.int8-symmetric": 72, "student-0.int8": 72}
    _, comparison = night_after(tmp_path, Scene(recipe=recipe, wrong=wrong))
    ((kind, text),) = causes(comparison)["sparsify/student-0"]
    assert kind == "new"
    assert text.startswith("it is new, since sparsify.kind went from absent to magnitude")
    assert "sparsify/student-0" in comparison.blame.sentence
    _, back = night_after(tmp_path / "back", Scene(), before=Scene(recipe=recipe))
    assert causes(back)["sparsify/student-0"][0][0] == "gone"


def test_rows_of_older_runs_say_that_they_do_not_know(tmp_path: Path) -> None:
    now = Scene(versions={**VERSIONS, "torchao": "0.19.0"}, wrong=FELL)
    _, comparison = night_after(tmp_path, now, before=Scene(made_of=False))
    assert comparison.blame.fell_at == "quantize/student-0"
    assert causes(comparison)["quantize/student-0"] == [
        ("unknown", "the older run does not say what it was made of, but torchao went from 0.18.0 to 0.19.0")
    ]


def test_a_stage_that_ran_again_and_gave_something_else_is_called_that(tmp_path: Path) -> None:
    _, comparison = night_after(tmp_path, Scene(repeat={"search": "another measurement"}))
    assert causes(comparison) == {
        "search/study": [("repeat", "it ran again and gave something else from the same code, libraries and settings")]
    }


def test_another_runtime_that_answers_otherwise_from_the_same_file(tmp_path: Path) -> None:
    now = Scene(versions={**VERSIONS, "onnxruntime-gpu": "1.32.0"}, wrong=FELL)
    regression, comparison = night_after(tmp_path, now)
    assert comparison.blame.sentence == (
        "Accuracy fell by 2.1 points at `evaluate/test`; its inputs are the same, "
        "onnxruntime-gpu went from 1.31.1 to 1.32.0."
    )
    assert regression.regressed


def test_a_larger_file_is_worse_and_no_regression(tmp_path: Path) -> None:
    regression, comparison = night_after(tmp_path, Scene(code={"quantize": "new"}, size=70_000))
    size = next(row for row in comparison.rows if row.what == "size")
    assert (size.word, size.now, size.before) == ("worse", 70_000, 60_000)
    assert not regression.regressed


def test_an_accepted_recipe_that_is_rejected_has_regressed(tmp_path: Path) -> None:
    regression, _ = night_after(tmp_path, Scene(outcome="regression"))
    assert regression.regressed
    assert regression.sentence.startswith("The gate says regression, and accepted before:")


def test_worse_calibration_is_told_by_its_interval(tmp_path: Path) -> None:
    regression, comparison = night_after(tmp_path, Scene(code={"quantize": "new"}, ece=0.06))
    assert words(comparison)["ECE"] == "worse"
    assert regression.regressed


def test_the_class_that_lost_most_is_named(tmp_path: Path) -> None:
    before, now = make_night(tmp_path, OLD), make_night(tmp_path, NEW, Scene(code={"quantize": "new"}))
    place = now.open("evaluate")
    assert place is not None
    answers = np.arange(1000) >= 32
    answers[7::10][:40] = False
    np.save(place / "student-0.int8.correct.npy", answers)
    (comparison,) = compare_runs(now, {"last good run": before}).comparisons
    worst = next(row for row in comparison.rows if row.what == "worst class")
    assert worst.note == "class 7, 100 images"
    assert worst.word == "worse"
    assert worst.now == pytest.approx(0.6)
    assert worst.before == pytest.approx(0.97)


def test_without_kept_answers_the_accuracy_is_compared_unpaired(tmp_path: Path) -> None:
    before, now = make_night(tmp_path, OLD), make_night(tmp_path, NEW, Scene(wrong=FELL))
    forgetful = [open_night(night.path, lambda _sha: None) for night in (now, before)]
    (comparison,) = compare_runs(forgetful[0], {"last good run": forgetful[1]}).comparisons
    accuracy = next(row for row in comparison.rows if row.what == "accuracy")
    assert accuracy.note == "not paired: its answers are kept no more"
    paired = compare_runs(now, {"last good run": before}).comparisons[0].rows[0]
    assert accuracy.change is not None
    assert paired.change is not None
    assert accuracy.change.high - accuracy.change.low > paired.change.high - paired.change.low


def matmul(size: int, layers: int) -> bytes:
    """An ONNX file of some work."""
    weights = np.random.default_rng(0).standard_normal((size, size)).astype(np.float32) / size
    nodes, last = [], "images"
    for layer in range(layers):
        nodes.append(helper.make_node("MatMul", [last, "w"], [f"y{layer}"]))
        last = f"y{layer}"
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", size])
    logits = helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", size])
    initial = helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.ravel())
    graph = helper.make_graph(nodes, "graph", [images], [logits], [initial])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def test_latency_is_measured_side_by_side_against_both(tmp_path: Path) -> None:
    small, large = matmul(256, 2), matmul(256, 24)
    before = make_night(tmp_path, OLD, Scene(onnx={"student-0.int8": small}))
    champion = make_night(
        tmp_path, "20261124T020000Z-cccccccc", Scene(code={"quantize": "x"}, onnx={"student-0.int8": large})
    )
    now = make_night(tmp_path, NEW, Scene(code={"quantize": "y"}, onnx={"student-0.int8": large}))
    regression = compare_runs(now, {"last good run": before, "champion": champion}, rounds=8)
    found = [next(row for row in each.rows if row.what == "latency") for each in regression.comparisons]
    assert found[0].word == "worse"
    assert found[0].change is not None
    assert found[0].change.low > 2
    assert found[0].now is not None
    assert found[0].before is not None
    assert found[0].now > found[0].before
    assert "noise floor" in found[0].note
    assert (found[1].word, found[1].note) == ("same", "the very same file")
    assert regression.regressed


def test_a_file_that_is_gone_is_not_timed_and_says_so(tmp_path: Path) -> None:
    _, comparison = night_after(tmp_path, Scene(onnx={"student-0.int8": matmul(8, 1)}), Scene(code={"quantize": "old"}))
    latency = next(row for row in comparison.rows if row.what == "latency")
    assert latency.word == "cannot tell"
    assert latency.note == "not timed: the other run's file is kept no more"


def test_words_follow_the_bounds() -> None:
    def change(low: float, high: float) -> Interval:
        return Interval(estimate=(low + high) / 2, low=low, high=high)

    assert judged(change(0.001, 0.01), 0.02, higher_is_better=True) == "better"
    assert judged(change(-0.01, -0.001), 0.02, higher_is_better=True) == "worse"
    assert judged(change(-0.01, 0.01), 0.02, higher_is_better=True) == "same within chance"
    assert judged(change(-0.03, 0.01), 0.02, higher_is_better=True) == "cannot tell"
    assert judged(change(0.001, 0.01), 0.02, higher_is_better=False) == "worse"
    assert judged_ratio(change(0.7, 0.8), 0.1) == "better"
    assert judged_ratio(change(1.02, 1.08), 0.1) == "same within chance"
    assert judged_ratio(change(1.12, 1.2), 0.1) == "worse"
    assert judged_ratio(change(0.8, 1.3), 0.1) == "cannot tell"


def test_the_unpaired_interval_covers_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        a, b = rng.binomial(200, 0.9) / 200, rng.binomial(300, 0.85) / 300
        found = unpaired_change(a, 200, b, 300)
        hits += found.low <= 0.05 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_the_calibration_interval_covers_no_change_when_there_is_none() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        pair = [
            [[c, rng.binomial(n, c) / n, n] for c, n in ((0.6, 50), (0.8, 150), (0.95, 300))] for _ in ("now", "before")
        ]
        found = ece_change(pair[0], pair[1], seed=seed, draws=500)
        hits += found.low <= 0 <= found.high
    assert hits / 200 >= 0.92


def test_the_trend_measures_every_front_against_one_point(tmp_path: Path) -> None:
    nights = [
        make_night(tmp_path, OLD),
        make_night(tmp_path, NEW, Scene(ratios={"student-0.int8": 0.1}, outcome="regression")),
    ]
    rows = trend(nights, champion=OLD)
    assert [row.champion for row in rows] == [True, False]
    assert [row.outcome for row in rows] == ["accept", "regression"]
    assert rows[0].accuracy == pytest.approx(0.968)
    assert rows[0].accuracy_low is not None
    assert rows[0].accuracy_high is not None
    assert rows[0].accuracy_low < 0.968 < rows[0].accuracy_high
    # (0.2, 0.968) and (0.4, 0.970) against (1, 0.1)
    assert measured_front(nights[0]) == pytest.approx(0.8 * 0.868 + 0.6 * 0.002)
    assert rows[1].hypervolume == pytest.approx(0.9 * 0.868 + 0.6 * 0.002)


class Page(HTMLParser):
    """Ids, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [str(values["id"])] if values.get("id") else []
        self.links += [str(values["href"])] if tag == "a" else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_links_to_the_reports_and_says_the_sentence(tmp_path: Path) -> None:
    before = make_night(tmp_path, OLD)
    now = make_night(tmp_path, NEW, Scene(versions={**VERSIONS, "torchao": "<b>0.19</b>"}, wrong=FELL))
    for night in (before, now):
        (night.path / "report.html").write_text("report")
    regression = compare_runs(now, {"last good run": before})
    text = write_pages(now.path, regression, trend([before, now], OLD)).read_text()
    page = Page(text)
    shown = "".join(page.words)
    assert "Regressed" in shown
    assert regression.sentence.replace("`", "") in shown
    assert "<b>0.19</b>" in shown
    assert f"../{OLD}/report.html" in page.links
    assert "report.html" in page.links
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert not re.findall(r'(?:src|href)="https?:', text)
    assert text.count("<svg") == 3
    kept = Regression.model_validate_json((now.path / "regression.json").read_text())
    assert kept == regression
    markdown = (now.path / "regression.md").read_text()
    assert regression.comparisons[0].blame.sentence in markdown
    assert json.loads((now.path / "regression.json").read_text())["regressed"] is True


def test_a_first_night_has_a_page_too(tmp_path: Path) -> None:
    now = make_night(tmp_path, NEW)
    regression = compare_runs(now, {})
    assert not regression.regressed
    shown = " ".join(Page(write_pages(now.path, regression, trend([now])).read_text()).words)
    assert "First accepted run" in shown
    assert "no earlier accepted run" in shown


def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected the folder of a finished run"):
        open_night(tmp_path, lambda _sha: None)
