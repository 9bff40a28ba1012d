"""All nightly recipes, one after the other, each isolated from the others' failure; then what the morning shows.

Every recipe with something to do runs as a subflow in a process of its own: a recipe that takes its process with it (a
runtime's crash, no memory left) ends alone, and what one recipe leaves in memory is gone before the next one is timed.
A recipe with nothing to do starts no process, no run and no MLflow run.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from tasks.settings import SOURCE_ROOT, prepare_prefect, settings

prepare_prefect()

from prefect import flow, get_client, get_run_logger, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.runtime import deployment as this_deployment  # noqa: E402
from prefect.runtime import flow_run as this_run  # noqa: E402
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending  # noqa: E402

from compression.errors import StillhouseError  # noqa: E402
from flows import children  # noqa: E402
from flows.cancelling import cancellable  # noqa: E402
from flows.compress import compress, plan  # noqa: E402
from flows.deployments import FLOW_RUN_VARIABLE  # noqa: E402
from flows.form import OfferedRecipes, recipe_file  # noqa: E402
from flows.recipe import Recipe, dump_recipe, load_recipe  # noqa: E402
from tasks.regression import write_regression  # noqa: E402
from tasks.run_folder import latest_finished, run_folders  # noqa: E402
from tasks.running import AlreadyRunning, holder, recipe_lock, running  # noqa: E402

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

NIGHT = ".nightly"
"""What a night holds as its lock; no recipe can have the name."""
ENTRYPOINT = f"{SOURCE_ROOT / 'flows' / 'compress.py'}:compress"
POLL_SECONDS = 1.0
BROKEN = ("failed", "crashed")


NightlyRecipe = Annotated[str, OfferedRecipes()]
"""A recipe's name. Not checked before the night begins: a recipe file that went away is that recipe's failure alone."""
WhenLate = Literal["catch_up", "skip"]


@flow(name="nightly")
def nightly(
    recipes: list[NightlyRecipe] = ["digits"],  # noqa: B006  (Prefect's form shows it)
    when_late: WhenLate = "catch_up",
    grace_hours: Annotated[float, Field(ge=0, le=168)] = 4.0,
) -> State[list[dict[str, Any]]]:
    """Run every recipe and compare it with its last good run and its champion.

    The state says how the night was: Completed, Unchanged (nothing to do), Skipped, Regressed, or Failed.

    Args:
        recipes: Names of the files in the folder recipes, in the order they run. One that fails does not stop the
            others.
        when_late: What becomes of a night that starts later than the hours of grace, say because the machine was off.
            catch_up: it runs; of several missed nights only the newest does. skip: it does not run.
        grace_hours: How late a night may start without being late.
    """
    reason = why_not(when_late, timedelta(hours=grace_hours))
    if reason is not None:
        return Completed(name="Skipped", message=f"Skipped: {reason}", data=[])
    try:
        with cancellable(), running(NIGHT, flow_run_id=str(this_run.id) if this_run.id else None, if_running="leave"):
            return _night(recipes)
    except AlreadyRunning:
        return Completed(name="Skipped", message=f"Skipped: another night is at work, {holder(NIGHT)}.", data=[])


def why_not(when_late: WhenLate, grace: timedelta) -> str | None:
    """Why a night that is late does not run; None when it does.

    A run that crashed and was started again is not late: its night had begun.
    """
    due = this_run.scheduled_start_time
    late = datetime.now(UTC) - due
    if late <= grace or (this_run.run_count or 1) > 1:
        return None
    shown = f"it was due {due:%Y-%m-%d %H:%M} UTC, {_hours(late)} ago"
    if when_late == "skip":
        return f"{shown}, and later than {_hours(grace)} is skipped."
    newer = _newer_night(due)
    return None if newer is None else f"superseded: {shown}, and {newer.name}, due later, does its work."


def _night(recipes: Sequence[str]) -> State[list[dict[str, Any]]]:
    started = time.monotonic()
    rows = [_row(name) for name in dict.fromkeys(recipes)]
    create_table_artifact(key="nightly", table=rows, description="Tonight's recipes")
    seconds = time.monotonic() - started
    broken = [row["recipe"] for row in rows if row["outcome"] in BROKEN or row["report"] in BROKEN]
    regressed = [row for row in rows if row["report"] == "regressed"]
    if broken:
        text = f"{len(broken)} of {_counted(len(rows))} failed: {', '.join(broken)}."
        text += "".join(f" {row['recipe']}: {row['summary']}" for row in rows if row["recipe"] in broken)
        return Failed(message=text[:3000], data=rows)
    if regressed:
        reports = {row["recipe"]: Path(row["folder"]) / "regression.html" for row in regressed}
        text = "\n".join(f"{row['recipe']}: {row['summary']} Report: {reports[row['recipe']]}" for row in regressed)
        return Completed(name="Regressed", message=text[:3000], data=rows)
    if all(row["outcome"] == "unchanged" for row in rows):
        text = f"Nothing has changed in {_counted(len(rows))}; looked in {seconds:.1f} s."
        return Completed(name="Unchanged", message=text, data=rows)
    text = ", ".join(f"{row['recipe']} {row['outcome']}" for row in rows)
    return Completed(message=f"{_counted(len(rows)).capitalize()}: {text}.", data=rows)


def _row(name: str) -> dict[str, Any]:
    """What became of one recipe, whatever happened."""
    logger = get_run_logger()
    started = time.monotonic()
    row: dict[str, Any] = {"recipe": name, "outcome": "", "report": "none", "summary": "", "folder": ""}
    try:
        row |= _one(name)
    except StillhouseError as error:
        logger.error("Recipe '%s' was refused or failed: %s", name, error)  # noqa: TRY400
        row |= {"outcome": "failed", "summary": str(error)}
    except Exception as error:
        logger.exception("Recipe '%s' crashed", name)
        row |= {"outcome": "crashed", "summary": f"{type(error).__name__}: {error}"}
    if row["folder"] and row["outcome"] not in BROKEN:
        row |= _reported(name, row)
    return row | {"seconds": round(time.monotonic() - started, 1)}


def _one(name: str) -> dict[str, Any]:
    recipe = load_recipe(recipe_file(name))
    with recipe_lock(recipe.name, "wait"):  # what somebody else's run of it keeps counts
        kept = unchanged(recipe)
    if kept is not None:
        text = f"Unchanged since run {kept['run']} ({kept['outcome']})."
        return {"outcome": "unchanged", "summary": text, "folder": kept["folder"]}
    state = _in_a_process(recipe)
    if state.is_cancelled():
        return {"outcome": "cancelled", "summary": state.message or "Cancelled."}
    if not state.is_completed():
        return {"outcome": "crashed" if state.is_crashed() else "failed", "summary": state.message or str(state.name)}
    summary = latest_finished(recipe.name, dump_recipe(recipe))
    if summary is None:
        return {"outcome": "crashed", "summary": "It completed and left no run folder."}
    return {"outcome": summary["outcome"], "summary": summary["summary"], "folder": summary["folder"]}


def unchanged(recipe: Recipe) -> dict[str, Any] | None:
    """Summary of the recipe's newest run when that is this recipe's and every stage is kept; else None."""
    summary = latest_finished(recipe.name, dump_recipe(recipe))
    newest = run_folders(recipe.name)
    if summary is None or newest[-1].name != summary["run"]:
        return None
    return None if any(stage.is_pending for stage in plan(recipe)) else summary


def _reported(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """The regression report of a new run, or of a kept one that has none yet."""
    folder = Path(row["folder"])
    if row["outcome"] == "unchanged" and (folder / "regression.json").is_file():
        return {}
    try:
        regression, page = write_regression(folder)
        create_markdown_artifact(
            key=f"regression-{regression.recipe}",
            markdown=(folder / "regression.md").read_text(encoding="utf-8"),
            description=f"{folder.name} against the last good run and the champion; {page}",
        )
    except Exception as error:
        get_run_logger().exception("The regression report of '%s' failed", name)
        return {"report": "failed", "summary": f"{row['summary']} No regression report: {error}"}
    word = "regressed" if regression.regressed else "written"
    return {"report": word, "summary": f"{row['summary']} {regression.sentence}"}


def _in_a_process(recipe: Recipe) -> State[Any]:
    """Run ``compress`` as a subflow in a process that ends with this one; its final state."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(
            compress,
            name=f"compress-{recipe.name}",
            parameters={"recipe": recipe.model_dump(mode="json")},
            tags=["stillhouse", "nightly"],
            parent_task_run_id=_place_in_this_run(client, recipe.name),
            state=Pending(),
        )
        gone = {"PREFECT__CONTROL_PORT", "PREFECT__CONTROL_TOKEN", "PREFECT__ENABLE_CANCELLATION_AND_CRASHED_HOOKS"}
        environment = {
            **{name: value for name, value in os.environ.items() if name not in gone},
            "PREFECT_API_URL": str(client.api_url),
            "PREFECT__FLOW_ENTRYPOINT": ENTRYPOINT,
            FLOW_RUN_VARIABLE: str(run.id),
        }
        command = [sys.executable, "-m", "prefect.engine", str(run.id)]
        log = settings().home_dir / "logs" / f"night-{recipe.name}.log"
        child = children.start(f"recipe {recipe.name}", command, environment=environment, folder=Path.cwd(), log=log)
        try:
            _wait(child, lambda: _state(client, run))
        except BaseException as error:
            children.end([child])
            _end(client, run, Cancelled(message=f"Its night was ended ({type(error).__name__})."))
            raise
        state = _state(client, run)
        if state is not None and state.is_cancelling():
            return _end(client, run, Cancelled(message="Cancelled."))
        if state is None or not state.is_final():
            text = f"Its process ended with exit code {child.exit_code}. Last lines of {log}:\n{children.tail(log)}"
            return _end(client, run, Crashed(message=text))
        return state


def _wait(child: children.Child, state: Callable[[], State[Any] | None]) -> None:
    """Until the process has ended; it is ended when its run is cancelled in the UI."""
    looks = 0
    while child.exit_code is None:
        time.sleep(POLL_SECONDS)
        child.notice_descendants()
        looks += 1
        found = None
        if looks % 3 == 0:
            with suppress(Exception):  # a server that does not answer is no reason to end the work
                found = state()
        if found is not None and found.is_cancelling():
            children.end([child])


def _place_in_this_run(client: "SyncPrefectClient", name: str) -> Any:
    """The task run below which a subflow of another process is shown; None outside of a flow run."""
    if not this_run.id:
        return None

    @task(name=name)
    def place() -> None: ...

    count = this_run.run_count or 1
    return client.create_task_run(place, this_run.id, dynamic_key=f"{name}-{count}", name=name, state=Pending()).id


def _state(client: "SyncPrefectClient", run: "FlowRun") -> State[Any] | None:
    return client.read_flow_run(run.id).state


def _end(client: "SyncPrefectClient", run: "FlowRun", state: State[Any]) -> State[Any]:
    client.set_flow_run_state(run.id, state, force=True)
    return state


def _newer_night(due: datetime) -> "FlowRun | None":
    """A run of the same deployment that was due later and is at work, done or about to start."""
    from prefect.client.schemas.filters import FlowRunFilter

    if not this_deployment.id:
        return None
    wanted = {
        "deployment_id": {"any_": [str(this_deployment.id)]},
        "expected_start_time": {"after_": due, "before_": datetime.now(UTC)},
        "state": {"type": {"any_": ["SCHEDULED", "PENDING", "RUNNING", "PAUSED", "COMPLETED"]}},
    }
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
    others = [run for run in found if str(run.id) != this_run.id and run.expected_start_time != due]
    return next((run for run in others if run.state_name != "Skipped"), None)


def _hours(time_: timedelta) -> str:
    return f"{time_.total_seconds() / 3600:.1f} h"


def _counted(number: int) -> str:
    return "1 recipe" if number == 1 else f"{number} recipes"
