"""A rollout as a person sees it: started in the form, waiting for a yes, its table when it is over."""

from typing import Any

import pytest

from tests.flows.running_up import FINAL, wait_for
from tests.flows.test_browser import Form, browser, screenshot, text_of  # noqa: F401  (browser is a fixture)
from tests.flows.test_rollout_flow import World, world  # noqa: F401  (world is a fixture)

pytestmark = [pytest.mark.browser, pytest.mark.e2e, pytest.mark.timeout(1500)]


def test_a_rollout_is_started_answered_and_looked_at_in_the_ui(world: World, browser: Any) -> None:  # noqa: F811
    seq, bundle = world.bundle()
    form = Form(browser, world.up, "rollout")
    form.click("str", "bundle")
    form.write(bundle, "bundle")
    form.click("RolloutPolicy", "policy")
    wait_for(lambda: "Devices of the first ring." in text_of(browser), 120, "the policy")
    assert not browser.find_elements("css selector", ".schema-form-property-kind-json")
    form.choose("canary", "Approve")
    screenshot(browser, "rollout-form", 2400)
    run = form.submit()
    address = world.up.state["prefect_url"]
    world.up.reaches(run["id"], "PAUSED", *FINAL, seconds=240)
    browser.get(f"{address}/runs/flow-run/{run['id']}")
    wait_for(lambda: "Suspended" in text_of(browser), 120, "the waiting run")
    form.press("Resume")
    wait_for(lambda: "1 of 3 devices have" in text_of(browser), 120, "the question")
    screenshot(browser, "rollout-question", 1000)
    switch = wait_for(lambda: browser.find_elements("css selector", "[role=switch], input[type=checkbox]"), 60, "on")
    browser.execute_script("arguments[0].click()", switch[-1])
    form.press("Submit")
    done = world.up.reaches(run["id"], *FINAL, seconds=240)
    assert done["state_name"] == "RolledOut", done["state"]
    assert set(world.active().values()) == {seq}
    browser.get(f"{address}/artifacts/artifact/{world.up.artifact('rollout-digits')['latest_id']}")
    wait_for(lambda: "gate-3" in text_of(browser), 120, "the table of devices")
    screenshot(browser, "rollout-table", 800)
