"""All nightly recipes, one after the other, each isolated from the others' failure; then one table over all."""

from pathlib import Path
from typing import Any

from tasks.settings import prepare_prefect

prepare_prefect()

from prefect import flow, get_run_logger  # noqa: E402
from prefect.artifacts import create_table_artifact  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402

from compression.errors import StillhouseError  # noqa: E402
from flows.compress import compress  # noqa: E402
from flows.recipe import load_recipe  # noqa: E402
from tasks.settings import settings  # noqa: E402


@flow(name="nightly")
def nightly(recipes: list[str] = ["recipes/digits.yaml"]) -> State[list[dict[str, Any]]]:  # noqa: B006
    """Run every recipe; a recipe that fails is a row, and the others still run.

    Args:
        recipes: Recipe files, relative to the project's root.
    """
    logger = get_run_logger()
    rows: list[dict[str, Any]] = []
    for path in recipes:
        try:
            summary: Any = compress(load_recipe(_resolve(path)))
            row = {
                "recipe": path,
                "outcome": summary["outcome"],
                "summary": summary["summary"],
                "folder": summary["folder"],
            }
        except StillhouseError as error:
            logger.error("Recipe '%s' was refused or failed: %s", path, error)  # noqa: TRY400
            row = {"recipe": path, "outcome": "failed", "summary": str(error), "folder": ""}
        except Exception as error:
            logger.exception("Recipe '%s' crashed", path)
            row = {
                "recipe": path,
                "outcome": "crashed",
                "summary": f"{type(error).__name__}: {error}",
                "folder": "",
            }
        rows.append(row)
    create_table_artifact(key="nightly", table=rows, description="Tonight's recipes")
    broken = [row["recipe"] for row in rows if row["outcome"] in ("failed", "crashed")]
    if broken:
        return Failed(message=f"{len(broken)} of {len(rows)} recipes failed: {', '.join(broken)}", data=rows)
    return Completed(message=f"{len(rows)} recipes ran", data=rows)


def _resolve(path: str) -> Path:
    given = Path(path)
    return given if given.is_absolute() else settings().root / given
