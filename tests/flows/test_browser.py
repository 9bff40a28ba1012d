"""What a person does: open the Prefect form in a real browser, start a run, watch it, look at it in MLflow."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.running_up import ROOT, RunningUp, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.e2e, pytest.mark.timeout(1500)]

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1600"
).split()


def tiny_recipe() -> dict[str, Any]:
    raw = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    quick = {"epochs": 2, "batch_size": 64, "learning_rate": 0.004}
    raw["data"]["limit"] = 500
    raw["teachers"] = raw["teachers"][:1]
    raw["teachers"][0]["model"] |= {"widths": [16], "depths": [1], "strides": [2], "stem_width": 16}
    raw["teachers"][0]["source"]["train"] = quick
    raw["select"]["panel_size"] = 1
    raw["search"] |= {"spaces": [{"kind": "prune", "parent": "residual", "ratios": [0.5]}], "trials": 1}
    raw["search"] |= {"train": {"epochs": 1, "batch_size": 64}, "max_macs_share": 1.0}
    raw["distill"] |= {"train": quick, "views": 2, "control": False}
    raw["quantize"] = None
    raw["targets"] = [{"kind": "onnxruntime", "name": "cpu", "precision": "float32"}]
    raw["benchmark_rounds"] = 3
    limits = ("max_accuracy_drop", "max_worst_class_drop", "max_ece_increase", "max_accuracy_gain")
    raw["policy"] = {**dict.fromkeys(limits), "faster_than_parent": False}
    return raw


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    """``stillhouse up`` with the real flows and a tiny recipe."""
    folder = tmp_path_factory.mktemp("browser")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe()))
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    by_name = {each["name"]: each for each in deployments["deployments"]}
    by_name["compress"]["build"][0]["flows.deployments.read_recipe"]["path"] = str(folder / "tiny.yaml")
    by_name["nightly"]["parameters"]["recipes"] = [str(folder / "tiny.yaml")]
    by_name["nightly"]["schedules"][0]["active"] = False
    (folder / "prefect.yaml").write_text(yaml.safe_dump(deployments, sort_keys=False))
    started = RunningUp(folder, source=ROOT, deployments=folder / "prefect.yaml")
    yield started
    started.end()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not (CHROMIUM.exists() and DRIVER.exists()):
        pytest.skip("needs chromium and chromium-driver (Debian packages)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def text_of(browser: Any) -> str:
    return browser.find_element("tag name", "body").text


def screenshot(browser: Any, name: str) -> None:
    """Kept where STILLHOUSE_SCREENSHOTS says, for people."""
    folder = os.environ.get("STILLHOUSE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_a_run_started_in_the_form_completes_and_shows_its_evidence(servers: RunningUp, browser: Any) -> None:
    address = servers.state["prefect_url"]
    browser.get(f"{address}/deployments/deployment/{servers.deployment('compress')['id']}/run")
    wait_for(lambda: "Names the run folder" in text_of(browser), 90, "the form")
    shown = text_of(browser)
    for tab in ("Digits", "FashionMnist", "ImageFolder", "ResidualCnn"):
        assert tab in shown
    screenshot(browser, "form")
    submit = next(each for each in browser.find_elements("css selector", "button") if each.text.strip() == "Submit")
    browser.execute_script("arguments[0].scrollIntoView(); arguments[0].click();", submit)
    (run, *_) = wait_for(lambda: servers.finished("compress"), 600, "the run")
    assert run["state_name"] == "Accepted", run["state"]
    browser.get(f"{address}/runs/flow-run/{run['id']}")
    wait_for(lambda: "Accepted" in text_of(browser), 90, "the page of the run")
    screenshot(browser, "run")
    browser.get(f"{address}/artifacts/artifact/{servers.artifact('comparison-digits')['latest_id']}")
    wait_for(lambda: "student-0.float32" in text_of(browser), 90, "the comparison table")
    screenshot(browser, "comparison")
    browser.get(f"{address}/artifacts/artifact/{servers.artifact('mlflow-run')['latest_id']}")
    links = wait_for(lambda: browser.find_elements("partial link text", "This run in MLflow"), 90, "the link to MLflow")
    link = links[0].get_attribute("href")
    assert link.startswith(servers.state["mlflow_url"])
    browser.get(link)
    wait_for(lambda: "Run ID" in text_of(browser), 90, "the run in MLflow")
    screenshot(browser, "mlflow-run")


def test_a_schedule_a_minute_ahead_starts_the_nightly_recipes(servers: RunningUp) -> None:
    nightly = servers.deployment("nightly")
    ahead = time.gmtime(time.time() + 75)
    schedule = {"cron": f"{ahead.tm_min} {ahead.tm_hour} * * *", "timezone": "UTC"}
    servers.api(f"/deployments/{nightly['id']}/schedules", [{"schedule": schedule, "active": True}])
    (run, *_) = wait_for(lambda: servers.finished("nightly"), 600, "the scheduled run")
    assert run["state_type"] == "COMPLETED", run["state"]
    assert run["auto_scheduled"]


def test_mlflow_compares_the_stages_of_the_runs(servers: RunningUp, browser: Any) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{servers.folder / 'mlruns' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stillhouse")
    assert experiment is not None
    parents = client.search_runs([experiment.experiment_id], "tags.stage = 'recipe'")
    assert len(parents) >= 2
    query = f"tags.`mlflow.parentRunId` = '{parents[0].info.run_id}' and tags.stage = 'distill'"
    (child,) = client.search_runs([experiment.experiment_id], query)
    query = f"tags.`mlflow.parentRunId` = '{parents[0].info.run_id}' and tags.stage = 'teacher'"
    (teacher,) = client.search_runs([experiment.experiment_id], query)
    ids = json.dumps([child.info.run_id, teacher.info.run_id])
    page = f"/#/compare-runs?runs={ids}&experiments={json.dumps([experiment.experiment_id])}"
    browser.get(servers.state["mlflow_url"] + page)
    wait_for(lambda: "Comparing 2 Runs" in text_of(browser), 120, "the compare page")
    shown = text_of(browser)
    for metric in ("accuracy", "macs", "ece"):
        assert metric in shown
    screenshot(browser, "mlflow-compare")
