"""What a person does: open the Prefect form in a real browser, start a run, watch it, look at it in MLflow.

``STILLHOUSE_SCREENSHOTS=docs/images`` with ``--basetemp=/tmp/stillhouse-demo`` makes the pictures of docs/ui.md.
"""

import json
import os
import shutil
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.running_up import FINAL, ROOT, RunningUp, wait_for
from tests.flows.tiny_recipe import tiny_recipe

pytestmark = [pytest.mark.browser, pytest.mark.e2e, pytest.mark.timeout(1500)]

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1600"
).split()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningUp]:
    """``stillhouse up`` with the real deployments, and a root whose recipes are the shipped ones and a tiny one."""
    folder = tmp_path_factory.mktemp("browser")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "recipes" / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(), sort_keys=False))
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    by_name = {each["name"]: each for each in deployments["deployments"]}
    by_name["nightly"]["parameters"]["recipes"] = ["tiny"]
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


def screenshot(browser: Any, name: str, height: int = 1600) -> None:
    """Kept where STILLHOUSE_SCREENSHOTS says, for people."""
    folder = os.environ.get("STILLHOUSE_SCREENSHOTS")
    if not folder:
        return
    from PIL import Image

    path = Path(folder) / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.set_window_size(1400, height)
    time.sleep(2)
    browser.save_screenshot(str(path))
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)
    browser.set_window_size(1400, 1600)


class Form:
    """The run form of a deployment in the page, opened as a person opens it. The page replaces what is clicked, so
    everything is looked for anew."""

    def __init__(self, browser: Any, servers: RunningUp, deployment: str) -> None:
        self.browser, self.servers, self.deployment = browser, servers, deployment
        identity = servers.deployment(deployment)["id"]
        browser.get(f"{servers.state['prefect_url']}/deployments/deployment/{identity}")
        self.click("Run")
        self.click("Custom run", last=True)
        wait_for(lambda: "Validate parameters" in text_of(browser), 120, "the form")

    def part(self, label: str) -> Any:
        """The field with that label; the first one, if sections have fields of the same name."""

        def found() -> Any:
            for each in self.browser.find_elements("css selector", ".schema-form-property"):
                (title, *_) = each.find_elements("css selector", ".schema-form-property__label")
                if title.text.partition(" (")[0] == label:
                    return each
            return None

        return self._patiently(found, f"field {label}")

    def click(self, button: str, part: str | None = None, *, last: bool = False) -> None:
        """A button of the page or of a field."""

        def clicked() -> bool:
            where = self.part(part) if part else self.browser
            found = [each for each in where.find_elements("css selector", "button") if each.text.strip() == button]
            found = [each for each in found if each.is_enabled()]
            if not found:
                return False
            script = "arguments[0].scrollIntoView({block: 'center'}); arguments[0].click();"
            self.browser.execute_script(script, found[-1 if last else 0])
            return True

        self._patiently(clicked, f"button {button}")

    def press(self, button: str) -> None:
        """The last button of that name on the page, say in a dialog."""
        self.click(button, last=True)

    def choose(self, value: str, part: str) -> None:
        """One of a dropdown's values."""
        from selenium.webdriver.support.ui import Select

        def chosen() -> bool:
            dropdown = Select(self.part(part).find_element("css selector", "select"))
            dropdown.select_by_visible_text(value)
            return dropdown.first_selected_option.text == value

        self._patiently(chosen, f"choice {value}")

    def write(self, text: str, part: str) -> None:
        """Type into the last box of a field."""

        def written() -> bool:
            box = self.part(part).find_elements("css selector", "input, textarea")[-1]
            box.clear()
            box.send_keys(text)
            return box.get_attribute("value") == text

        self._patiently(written, f"box of {part}")

    def submit(self) -> dict[str, Any]:
        """Click until a run has come into being: on a busy machine a click can be lost. The run."""
        before = {run["id"] for run in self._runs()}

        def new_run() -> dict[str, Any] | None:
            return next((run for run in self._runs() if run["id"] not in before), None)

        for _ in range(4):
            self.click("Submit")
            try:
                return wait_for(new_run, 40, "a run")
            except AssertionError:
                if "/run" not in self.browser.current_url:  # the form is gone: the click was not lost
                    return wait_for(new_run, 60, "the run")
        raise AssertionError(text_of(self.browser))

    def refused(self) -> str:
        """What the page says of values that the server does not take; no run came into being."""
        before = len(self._runs())
        self.click("Submit")
        wait_for(lambda: "Validation failed" in text_of(self.browser), 90, "the refusal")
        assert len(self._runs()) == before
        said = text_of(self.browser)
        return said[said.index("Validation failed") :]

    def _runs(self) -> list[dict[str, Any]]:
        wanted = {"deployment_id": {"any_": [self.servers.deployment(self.deployment)["id"]]}}
        return self.servers.api("/flow_runs/filter", {"flow_runs": wanted})

    def _patiently(self, ready: Any, what: str) -> Any:
        from selenium.common.exceptions import WebDriverException

        def tried() -> Any:
            try:
                return ready()
            except (WebDriverException, IndexError, ValueError):  # replaced between two looks
                return None

        return wait_for(tried, 60, what)


def fill_in(form: Form) -> None:
    """The tiny recipe with another seed and shorter trainings."""
    form.choose("tiny", "Name")
    form.click("Add item", "Set")
    form.write("distill.train.epochs=6", "Set")
    form.click("another", "Seed")
    form.write("7", "Seed")


def newest_folder(servers: RunningUp) -> Path:
    return sorted((servers.folder / "runs" / "tiny").iterdir())[-1]


def test_a_run_started_in_the_form_completes_and_shows_its_evidence(servers: RunningUp, browser: Any) -> None:
    form = Form(browser, servers, "compress")
    shown = text_of(browser)
    for words in ("By name", "Written out", "As text", "fashion-mnist", "Seeds every split", "what has changed"):
        assert words in shown
    assert "template" not in shown
    fill_in(form)
    screenshot(browser, "form-by-name", 1800)
    run = form.submit()
    address = servers.state["prefect_url"]
    browser.get(f"{address}/runs/flow-run/{run['id']}")
    done = servers.reaches(run["id"], *FINAL, seconds=900)
    assert done["state_name"] == "Accepted", done["state"]
    wait_for(lambda: "Accepted" in text_of(browser), 120, "the page of the run")
    browser.refresh()  # its picture of the stages is drawn to the time when it was opened
    (tab,) = wait_for(lambda: browser.find_elements("xpath", "//li[normalize-space(.)='Artifacts']"), 120, "the tabs")
    screenshot(browser, "flow-run", 1000)
    browser.execute_script("arguments[0].click()", tab)
    wait_for(lambda: "comparison-tiny" in text_of(browser), 120, "the artifacts of the run")
    screenshot(browser, "artifacts", 1000)
    browser.get(f"{address}/artifacts/artifact/{servers.artifact('comparison-tiny')['latest_id']}")
    wait_for(lambda: "student-0.float32" in text_of(browser), 120, "the comparison table")
    screenshot(browser, "comparison", 1000)
    browser.get(f"{address}/artifacts/artifact/{servers.artifact('report-tiny')['latest_id']}")
    wait_for(lambda: "Verdict" in text_of(browser) or "accept" in text_of(browser), 120, "the report")
    browser.get(f"{address}/artifacts/artifact/{servers.artifact('mlflow-run')['latest_id']}")
    links = wait_for(
        lambda: browser.find_elements("partial link text", "This run in MLflow"), 120, "the link to MLflow"
    )
    link = links[0].get_attribute("href")
    assert link.startswith(servers.state["mlflow_url"])
    browser.get(link)
    wait_for(lambda: "recipe.seed" in text_of(browser), 120, "the parameters of the run in MLflow")
    (row,) = (each.text for each in browser.find_elements("css selector", "[role=row]") if "recipe.seed" in each.text)
    assert row.split()[-1] == "7"
    browser.find_element("css selector", "input[placeholder='Search parameters']").send_keys("seed")
    screenshot(browser, "mlflow-run", 1700)


def test_a_stage_is_done_again_from_the_form(servers: RunningUp, browser: Any) -> None:
    form = Form(browser, servers, "compress")
    fill_in(form)
    form.click("this stage", "restart_from")
    form.choose("gate", "restart_from")
    done = servers.reaches(form.submit()["id"], *FINAL, seconds=900)
    assert done["state_name"] == "Accepted", done["state"]
    lineage = json.loads((newest_folder(servers) / "lineage.json").read_text())
    assert {row["stage"] for row in lineage if not row["cached"]} == {"gate", "register"}


def test_a_wrong_value_is_refused_with_the_name_of_its_field(servers: RunningUp, browser: Any) -> None:
    form = Form(browser, servers, "compress")
    form.click("another", "Seed")
    form.write("-1", "Seed")
    assert "'recipe.seed'" in form.refused()
    screenshot(browser, "refused", 1000)


def test_every_kind_of_a_union_stays_chosen_in_the_form(servers: RunningUp, browser: Any) -> None:
    """Prefect's form takes kinds with the same fields for one another; flows/form_schema.py helps it."""
    form = Form(browser, servers, "compress")
    form.click("Ptq", "Quantize")
    form.click("DistillConfig", "Distill")
    form.write("0.3", "Weight")  # of the first loss: a list of kinds has tabs too
    time.sleep(1)

    def chosen(part: str) -> list[str]:
        return [each.text for each in form.part(part).find_elements("css selector", "button[aria-selected=true]")]

    assert chosen("Quantize")[0] == "Ptq"
    assert chosen("Losses")[:2] == ["CrossEntropy", "Kd"]
    form.click("Written out", "recipe")
    wait_for(lambda: "What it is for, in one line." in text_of(browser), 120, "the recipe written out")
    assert not browser.find_elements("css selector", ".schema-form-property-kind-json")
    screenshot(browser, "form-written-out", 1800)


def test_an_unknown_parameter_is_refused(servers: RunningUp) -> None:
    """Left to itself, Prefect's server takes it, and the run crashes without a word."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        servers.start("compress", recipe={"name": "tiny"}, epochs=3)
    assert caught.value.code == 409
    assert "'epochs' was unexpected" in caught.value.read().decode()


def test_a_start_that_may_not_wait_leaves_a_recipe_that_runs(
    servers: RunningUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.running import running
    from tasks.settings import settings

    monkeypatch.setenv("STILLHOUSE_ROOT", str(servers.folder))
    settings.cache_clear()
    before = sorted((servers.folder / "runs").glob("*/*"))
    try:
        with running("tiny"):
            started = servers.start("compress", recipe={"name": "tiny", "seed": 9}, if_running="leave")
            done = servers.reaches(started, *FINAL, seconds=300)
    finally:
        settings.cache_clear()
    assert done["state_name"] == "Left", done["state"]
    assert f"process {os.getpid()}" in done["state"]["message"]
    assert sorted((servers.folder / "runs").glob("*/*")) == before


def test_a_schedule_starts_the_nightly_recipes(servers: RunningUp) -> None:
    nightly = servers.deployment("nightly")
    ahead = time.gmtime(time.time() + 135)  # the server looks for new schedules once a minute
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
