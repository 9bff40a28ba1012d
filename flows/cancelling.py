"""What a flow owes to those who watch it: it says itself that it was cancelled, and its output outlives the worker."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flows.deployments import FLOW_RUN_VARIABLE
from tasks.settings import settings

logger = logging.getLogger(__name__)


@contextmanager
def cancellable() -> Iterator[None]:
    """Around the body of a flow: ended because it, or the flow it is part of, was cancelled, it is CANCELLED at once.

    The training below has saved its state by then. Left alone, Prefect's worker says it when it has run the flow's
    hooks in a process of their own, which takes as long as importing the flow; and a training that holds signals back
    until its step is whole looks to Prefect like a crash. Outside of a flow run it does nothing.
    """
    from prefect.exceptions import TerminationSignal

    _keep_output()
    try:
        yield
    except TerminationSignal:
        try:
            _say_cancelled()
        except Exception as error:  # the reconciler will say it
            logger.warning("Prefect could not be told that the run was cancelled: %s", error)
        raise


def _keep_output() -> None:
    """Write what a worker would drop to ``<home>/logs/flow-runs/<id>.log``.

    The work pool does not stream output: a pipe breaks when the worker dies, and would take the flow with it.
    """
    run = os.environ.get(FLOW_RUN_VARIABLE)
    if not run or not os.path.samestat(os.fstat(1), Path(os.devnull).stat()):
        return
    folder = settings().home_dir / "logs" / "flow-runs"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{run}.log").open("ab") as file:
            sys.stdout.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)


def _say_cancelled() -> None:
    from prefect import get_client
    from prefect.context import FlowRunContext
    from prefect.runtime import flow_run as runtime
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings
    from prefect.states import Cancelled

    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    run = context.flow_run
    with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 1}), get_client(sync_client=True) as client:
        states = [client.read_flow_run(each).state for each in {run.id, runtime.root_flow_run_id or run.id}]
        if not any(state is not None and (state.is_cancelling() or state.is_cancelled()) for state in states):
            return
        state = Cancelled(message="Stopped as asked. What is done is kept; start it again to go on.")
        client.set_flow_run_state(run.id, state, force=True)
        run.state = state  # so that the engine does not call it a crash
