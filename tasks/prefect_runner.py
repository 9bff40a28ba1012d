"""Stages as Prefect tasks: one task run each, named, tagged, with state Cached when nothing had to be done."""

import logging
from collections.abc import Mapping
from typing import Any

from prefect import task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.states import Completed

from tasks.progress import Throttle
from tasks.stage import DirectRunner, Stage, StageResult

logger = logging.getLogger(__name__)


class PrefectRunner(DirectRunner):
    """Runs each stage inside a Prefect task of its own; must be used within a flow run."""

    def run(self, stage: Stage, name: str, inputs: Mapping[str, Any]) -> StageResult:
        """Carry the stage out as a task run named ``<stage>/<name>``."""

        @task(
            name=stage.name,
            task_run_name=f"{stage.name}/{name}",
            description=stage.fn.__doc__,
            tags=set(stage.tags),
            cache_policy=NO_CACHE,  # the stage index is the cache: it verifies what it serves
            persist_result=False,
        )
        def body() -> StageResult | State[StageResult]:
            result = self.execute(stage, name, inputs)
            if result.cached:
                return Completed(name="Cached", message="Nothing it depends on has changed.", data=result)
            return result

        result = body()
        if isinstance(result, State):
            result = result.result()
        self.results.append(result)
        return result


class UiProgress:
    """A progress artifact in the Prefect UI for each kind of long work, written every few seconds."""

    def __init__(self, seconds: float = 5.0) -> None:
        self._ids: dict[str, Any] = {}
        self._throttles: dict[str, Throttle] = {}
        self._seconds = seconds

    def __call__(self, text: str, done: int, total: int) -> None:
        """Report; silent outside of a flow run."""
        if FlowRunContext.get() is None:
            return
        throttle = self._throttles.setdefault(text, Throttle(self._write, self._seconds))
        throttle(text, done, total)

    def _write(self, text: str, done: int, total: int) -> None:
        percent = 100.0 * done / max(total, 1)
        if text not in self._ids:
            key = "progress-" + "".join(letter if letter.isalnum() else "-" for letter in text.lower())
            self._ids[text] = create_progress_artifact(progress=percent, key=key, description=text)
        else:
            update_progress_artifact(artifact_id=self._ids[text], progress=percent)
