"""One source of numbers: what the files, the page, the program and MLflow say of a real tiny run is the same."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.tiny_recipe import tiny_recipe

pytestmark = [pytest.mark.e2e, pytest.mark.servers, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()

RUN = """
import json, sys
from pathlib import Path
from flows.compress import run_recipe
from flows.recipe import load_recipe
print(json.dumps(run_recipe(load_recipe(Path("tiny.yaml")), restart_from=sys.argv[1] if len(sys.argv) > 1 else None)))
"""
COMPARE = """
import io, json, sys
from pathlib import Path
from rich.console import Console
from compression.errors import InputError
from flows.comparing import compare_runs
answers = []
for options in json.loads(sys.argv[1]):
    options |= {key: Path(options[key]) for key in ("csv_path", "html_path") if key in options}
    out = io.StringIO()
    try:
        code = compare_runs(Console(file=out, width=220), options.pop("runs", ()), **options)
    except InputError as error:
        code, out = 2, io.StringIO(str(error))
    answers.append([code, out.getvalue()])
print(json.dumps(answers))
"""


def two_targets() -> dict[str, Any]:
    raw = tiny_recipe("digits", images=500, epochs=2, batch_size=64)
    raw["search"]["train"]["epochs"] = 2
    raw["distill"]["control"] = True
    raw["targets"].append(
        {"kind": "tensorrt_rtx", "name": "rtx", "compute_capabilities": ["SM86"], "precision": "float16"}
    )
    raw |= {"robustness": None, "attention": None}
    return raw


def python(place: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "STILLHOUSE_ROOT": str(place), "STILLHOUSE_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env={**environment, "COLUMNS": "220"},
        cwd=place,
        check=False,
    )


def compare(place: Path, *asked: dict[str, Any]) -> list[tuple[int, str]]:
    """(exit code, what was printed) for each set of options; one process, since its start takes seconds."""
    done = python(place, COMPARE, json.dumps(asked))
    assert done.returncode == 0, done.stderr
    return [(code, text) for code, text in json.loads(done.stdout.strip().splitlines()[-1])]


def listed(place: Path, *asked: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(text) for _, text in compare(place, *({**options, "as_json": True} for options in asked))]


def run(place: Path, *arguments: str) -> dict[str, Any]:
    done = python(place, RUN, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("comparing")
    (place / "tiny.yaml").write_text(yaml.safe_dump(two_targets()))
    return place


@pytest.fixture(scope="module")
def first(place: Path) -> dict[str, Any]:
    """A run, whose model is then made the champion."""
    summary = run(place)
    assert summary["outcome"] == "accept", summary
    code = """
import sys
from tasks import registry
version = registry.promote("digits", int(sys.argv[1]), by="a test", reason="the first")
registry.tag(version, {"run_folder": sys.argv[2]})
"""
    done = python(place, code, str(summary["registered"]["version"]), summary["folder"])
    assert done.returncode == 0, done.stderr
    return summary


@pytest.fixture(scope="module")
def second(place: Path, first: dict[str, Any]) -> dict[str, Any]:
    """The same recipe again, timed anew."""
    return run(place, "benchmark")


def rows_of(summary: dict[str, Any]) -> list[dict[str, str]]:
    with (Path(summary["folder"]) / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What a row says in numbers; words and gaps left out."""
    found = {}
    for name, value in row.items():
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            continue
    return {name: value for name, value in found.items() if math.isfinite(value)}


def mlflow(place: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{place / 'mlruns' / 'mlflow.db'}")


def files_in_mlflow(place: Path, summary: dict[str, Any]) -> dict[str, Any]:
    client = mlflow(place)
    experiment = client.get_experiment_by_name("stillhouse")
    query = f"tags.`mlflow.parentRunId` = '{summary['mlflow_run']}' and tags.stage = 'file'"
    found = client.search_runs([experiment.experiment_id], query, max_results=1000)
    by_name = {each.info.run_name: each for each in found}
    assert len(by_name) == len(found), "a file is shown once"
    return by_name


def embedded(page: Path) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(), flags=re.DOTALL)
    return json.loads(text)


def test_every_number_is_the_same_in_the_file_the_page_the_program_and_mlflow(place: Path, first: dict) -> None:
    rows = rows_of(first)
    assert len(rows) >= 6
    page = embedded(Path(first["folder"]) / "report.html")["rows"]
    (answer,) = listed(place, {"runs": [first["folder"]]})
    shown = files_in_mlflow(place, first)
    assert [row["id"] for row in page] == [row["id"] for row in answer["rows"]] == [row["id"] for row in rows]
    assert set(shown) == {row["id"] for row in rows}
    compared = 0
    for row, in_page, in_list in zip(rows, page, answer["rows"], strict=True):
        wanted = numbers(row)
        in_list = {name: value for name, value in in_list.items() if name in row}
        for name, value in wanted.items():
            assert in_page[name] == value, name
        assert numbers(in_page) | {"pareto": 0} == numbers(in_list) | {"pareto": 0} == wanted | {"pareto": 0}
        assert str(in_page.get("pareto", "not run")) == row["pareto"]
        metrics, batch = shown[row["id"]].data.metrics, row["batch"]
        for name, value in wanted.items():
            if name != "batch":
                found = {metrics.get(name), metrics.get(f"{name}.b{batch}")} - {None}
                assert found == {value}, (row["id"], name)
                compared += 1
        on_front = shown[row["id"]].data.params["pareto"].split(", ")
        assert (f"b{batch}" in on_front) is (row["pareto"] == "True")
        for name in ("role", "precision", "runtime", "provider", "isa", "stages", "verdict"):
            found = shown[row["id"]].data.params.get(name)
            assert found == row[name] or (found is None and row[name] in ("not measured", "not run", "none"))
    assert compared > 100


def test_the_numbers_of_a_file_are_logged_once(place: Path, first: dict) -> None:
    code = """
import sys
from pathlib import Path
from tasks.candidates import log_rows
from tasks.run_folder import read_rows
from tasks.tracking import Run
log_rows(Run(sys.argv[1]), read_rows(Path(sys.argv[2])))
"""
    before = {name: each.info.run_id for name, each in files_in_mlflow(place, first).items()}
    done = python(place, code, first["mlflow_run"], first["folder"])
    assert done.returncode == 0, done.stderr
    after = files_in_mlflow(place, first)
    assert {name: each.info.run_id for name, each in after.items()} == before
    for each in after.values():
        for name in each.data.metrics:
            assert len(mlflow(place).get_metric_history(each.info.run_id, name)) == 1


def test_learning_curves_of_trials_and_students_are_series_in_mlflow(place: Path, first: dict) -> None:
    client = mlflow(place)
    experiment = client.get_experiment_by_name("stillhouse")
    folder = Path(first["folder"])
    histories = json.loads((folder / "histories.json").read_text())
    for stage, name in (("distill", "student-0"), ("distill", "student-0-control"), ("teacher", "residual")):
        query = f"tags.`mlflow.parentRunId` = '{first['mlflow_run']}' and attributes.run_name = '{stage}/{name}'"
        (found,) = client.search_runs([experiment.experiment_id], query)
        for key in ("validation_accuracy", "loss"):
            series = client.get_metric_history(found.info.run_id, f"train/{key}")
            assert [(m.step, m.value) for m in sorted(series, key=lambda m: m.step)] == [
                (row["epoch"], row[key]) for row in histories[name]
            ]
    (trial,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'trial-0'")
    series = client.get_metric_history(trial.info.run_id, "train/validation_accuracy")
    assert sorted(m.step for m in series) == [0, 1]
    assert len({m.step for m in series}) == len(series)


def test_rows_are_chosen_sorted_and_written(place: Path, first: dict) -> None:
    engine = yaml.safe_load((place / "tiny.yaml").read_text())["targets"][1]["name"]
    asked: list[dict[str, Any]] = [
        {"roles": ["teacher"]},
        {"targets": ["cpu"], "roles": ["student"]},
        {"targets": [engine]},
        {"batches": [1], "sort": "latency_p50_ms"},
        {"batches": [1], "sort": "-latency_p50_ms"},
        {"batches": [1], "front": True},
        {"where": ["accuracy>2"]},
    ]
    teachers, students, engines, fastest, slowest, front, none = (
        [row["id"] for row in answer["rows"]] for answer in listed(place, *asked)
    )
    assert set(teachers) == {"teacher-residual.float32"}
    assert set(students) == {"student-0.float32"}
    assert engines == [f"student-0.{engine}-sm86"]
    assert fastest == slowest[::-1]
    assert front == [row["id"] for row in rows_of(first) if row["batch"] == "1" and row["pareto"] == "True"]
    assert none == []
    ((code, _),) = compare(place, {"csv_path": "some.csv", "columns": "id,batch,p50", "where": ["batch=1"]})
    assert code == 0
    header, *lines = (place / "some.csv").read_text().splitlines()
    assert header == "id,batch,latency_p50_ms"
    assert len(lines) == len(fastest)


def test_what_cannot_be_meant_is_refused(place: Path, first: dict) -> None:
    wanted = {
        "Did you mean 'accuracy'": {"where": ["acuracy>0.9"]},
        "expected a number": {"where": ["accuracy>much"]},
        "expected = or !=": {"where": ["role>student"]},
        "has no sign": {"where": ["accuracy"]},
        "Column 'p51' does not exist": {"columns": "id,p51"},
        "Run 'nowhere' has no run folder": {"runs": ["nowhere"]},
    }
    for said, (code, text) in zip(wanted, compare(place, *wanted.values()), strict=True):
        assert code == 2
        assert said in text


def test_the_champion_is_marked_also_when_it_is_of_another_night(place: Path, first: dict, second: dict) -> None:
    (target,) = second["ships"].values()
    asked = {"runs": [second["folder"]]}
    (_, text), (_, content) = compare(place, asked, {**asked, "as_json": True})
    shown = json.loads(content)
    (champion,) = shown["champions"]
    assert (champion["run"], champion["file"]) == (Path(first["folder"]).name, target)
    marked = [row for row in shown["rows"] if row["champion"]]
    assert {(row["run"], row["id"]) for row in marked} == {(champion["run"], champion["file"])}
    wanted = {(row["batch"], float(row["latency_p50_ms"])) for row in rows_of(first) if row["id"] == target}
    assert {(str(row["batch"]), row["latency_p50_ms"]) for row in marked} == wanted
    assert f"Champion of digits: version {champion['version']}, {target} of run {champion['run']}." in text
    assert "Pareto front of digits:" in text
    kept = json.loads((Path(second["folder"]) / "champion.json").read_text())
    assert {(batch, value) for batch, value in kept["latency_p50_ms_by_batch"].items()} == wanted
    assert not (Path(first["folder"]) / "champion.json").exists()
    assert embedded(Path(second["folder"]) / "report.html")["marks"]
    assert "champion, version" in (Path(second["folder"]) / "report.html").read_text()


def test_the_ledger_says_what_was_spent_and_what_was_kept(place: Path, first: dict, second: dict) -> None:
    lineage = json.loads((Path(second["folder"]) / "lineage.json").read_text())
    spent = sum(row["seconds"] for row in lineage if not row["cached"])
    kept = sum(row["seconds"] for row in lineage if row["cached"])
    assert kept > spent > 0
    from export.comparison import show

    text = (Path(second["folder"]) / "report.md").read_text()
    assert f"Spent in this run: {show(spent, 'seconds')} (CPU {cpu(lineage, cached=False)}" in text
    assert f"Saved by kept stages: {show(kept, 'seconds')} (CPU {cpu(lineage, cached=True)}" in text


def cpu(lineage: list[dict[str, Any]], *, cached: bool) -> str:
    from export.comparison import show

    return show(sum(row["cpu_seconds"] for row in lineage if row["cached"] is cached), "seconds")


def test_the_card_is_in_the_folder_in_mlflow_and_in_the_registry(place: Path, first: dict, second: dict) -> None:
    folder = Path(first["folder"])
    names = {item.path for item in mlflow(place).list_artifacts(first["mlflow_run"])}
    assert {"model_card.md", "model_card.html", "comparison.csv", "data.json"} <= names
    text = (folder / "model_card.md").read_text()
    model = first["registered"]
    version = mlflow(place).get_model_version(model["model"], str(model["version"]))
    assert model["file"] in version.description
    assert "This is the first" in text
    assert "The champion is version" in (Path(second["folder"]) / "model_card.md").read_text()
    for digest in json.loads((folder / "data.json").read_text())["hashes"].values():
        assert digest in text


def test_the_lines_of_the_card_run_the_shipped_file_as_accurately_as_it_says(place: Path, first: dict) -> None:
    folder = Path(first["folder"])
    (lines,) = [
        code
        for code in re.findall(r"```python\n(.*?)```", (folder / "model_card.md").read_text(), flags=re.DOTALL)
        if "onnxruntime" in code
    ]
    after = "\nprint(logits.shape)"
    done = subprocess.run(
        [sys.executable, "-c", lines + after], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "(1, 10)", done.stderr
    (data,) = [row for row in json.loads((folder / "lineage.json").read_text()) if row["stage"] == "data"]
    (stored,) = (place / ".stillhouse" / "store").rglob(f"{data['output']}*/test.images.npy")
    labels = stored.with_name("test.labels.npy")
    own = re.sub(r"raw = .*", f"raw = np.load({str(stored)!r})", lines)
    own += f"\nprint((logits.argmax(1) == np.load({str(labels)!r})).mean())"
    done = subprocess.run([sys.executable, "-c", own], cwd=folder, capture_output=True, text=True, check=False)
    accuracy = next(float(row["accuracy"]) for row in rows_of(first) if row["verdict"] == "ships")
    assert float(done.stdout) == pytest.approx(accuracy), done.stderr


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("needs chromium and chromium-driver (Debian packages)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def open_page(browser: Any, page: Path, width: int = 1280, *, scripts: bool = True) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get(page.as_uri())


def visible_rows(browser: Any) -> list[str]:
    shown = "return [...document.querySelectorAll('.explorer tbody tr')].filter((row) => row.offsetParent).map("
    return browser.execute_script(shown + "(row) => row.cells[0].innerText.trim())")


def set_value(browser: Any, name: str, value: str) -> None:
    browser.execute_script(
        "const field = document.querySelector(`[name=${arguments[0]}]`); field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', {bubbles: true}))",
        name,
        value,
    )


@pytest.fixture(scope="module")
def page(place: Path, first: dict, second: dict) -> Path:
    compare(place, {"runs": [first["folder"], second["folder"]], "html_path": "all.html"})
    return place / "all.html"


@pytest.mark.browser
def test_the_page_filters_sorts_and_draws(browser: Any, page: Path, first: dict, second: dict) -> None:
    open_page(browser, page)
    rows = [*rows_of(first), *rows_of(second)]
    assert len(visible_rows(browser)) == len(rows)
    set_value(browser, "role", "teacher")
    assert set(visible_rows(browser)) == {"teacher-residual.float32"}
    set_value(browser, "batch", "32")
    assert len(visible_rows(browser)) == 2
    caption = browser.find_element("css selector", "figure.front figcaption").text
    assert "batch 32" in caption
    points = browser.find_elements("css selector", "figure.front .point")
    assert len(points) == sum(row["batch"] == "32" and row["accuracy"] != "not measured" for row in rows)
    assert len(browser.find_elements("css selector", "figure.front .point:not(.out)")) == 2
    set_value(browser, "role", "")
    slowest = max(float(row["latency_p50_ms"]) for row in rows if row["batch"] == "32")
    set_value(browser, "max_p50", str(slowest * 0.999999))
    assert len(visible_rows(browser)) == sum(
        row["batch"] == "32" and row["latency_p50_ms"] != "not measured" and float(row["latency_p50_ms"]) < slowest
        for row in rows
    )
    set_value(browser, "text", "no such words")
    assert visible_rows(browser) == []
    browser.find_element("css selector", "button[type=reset]").click()
    browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert len(visible_rows(browser)) == len(rows)
    heading = next(
        each for each in browser.find_elements("css selector", ".explorer th button") if each.text == "accuracy"
    )
    heading.click()
    heading.click()
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    best = max((row for row in rows if row["accuracy"] != "not measured"), key=lambda row: float(row["accuracy"]))
    top = next(row for row in rows if row["id"] == visible_rows(browser)[0].removesuffix(" ★"))
    assert top["accuracy"] == best["accuracy"]
    assert browser.find_elements("css selector", ".point .star"), "the champion is drawn as a star"
    assert len(browser.find_elements("css selector", ".curves .curve")) >= 4
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.browser
def test_the_page_works_with_the_keyboard_and_every_control_has_a_label(browser: Any, page: Path) -> None:
    open_page(browser, page)
    unlabelled = browser.execute_script(
        "return [...document.querySelectorAll('input, select, button, summary, [role=button]')].filter((each) =>"
        "!(each.labels?.length || each.getAttribute('aria-label') || each.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert unlabelled == []
    point = browser.find_element("css selector", "figure.front .point[tabindex]")
    number = point.get_attribute("data-row")
    before = point.get_attribute("aria-pressed")
    browser.execute_script("arguments[0].focus()", point)
    from selenium.webdriver.common.keys import Keys

    browser.switch_to.active_element.send_keys(Keys.ENTER)
    again = browser.find_element("css selector", f'[data-row="{number}"]')
    assert again.get_attribute("aria-pressed") != before
    assert browser.switch_to.active_element == again


@pytest.mark.browser
def test_pages_fit_a_telephone_and_read_without_scripts(browser: Any, page: Path, first: dict, second: dict) -> None:
    folder = Path(first["folder"])
    for each in (page, folder / "report.html", folder / "model_card.html"):
        open_page(browser, each, width=360)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360, each
    open_page(browser, page, scripts=False)
    assert not browser.find_element("css selector", "form.filters").is_displayed()
    rows = browser.find_elements("css selector", ".explorer tbody tr")
    assert len(rows) == len(rows_of(first)) + len(rows_of(second))
    assert all(row.is_displayed() for row in rows)
