"""The model card of a run, and its short form in the registry."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.model_card import card
from export.report.run_folder import open_run
from tasks import tracking

DESCRIPTION_LENGTH = 4000  # of what a registered version may carry


def write_card(folder: Path, registered: Mapping[str, Any] | None = None) -> Path:
    """Write ``model_card.md`` and ``.html`` into the folder of an accepted run and describe its registered version.

    Raises:
        InputError: the run was not accepted.
    """
    path = card.write_card(folder, registered)
    if registered and registered.get("version"):
        text = card.short(open_run(folder))[:DESCRIPTION_LENGTH]
        tracking.client().update_model_version(str(registered["model"]), str(registered["version"]), text)
    return path


def log_card(folder: Path, run_id: str) -> None:
    """Put a rewritten card beside the run's other files in MLflow."""
    run = tracking.Run(run_id)
    for name in card.STEMS:
        run.log_file(folder / name)
