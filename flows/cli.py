"""The ``stillhouse`` program: parses, calls a flow or one function, prints. Heavy imports wait until they are needed.

Exit codes: 0 accepted, 1 rejected by the gate, 2 bad input, 3 failed.
"""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.table import Table

from flows import bundling, deltas, devices, operating, rollouts

if TYPE_CHECKING:
    from flows.recipe import Recipe

app = typer.Typer(
    name="stillhouse",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn big teacher models into small verified edge models.\n\n"
    "Start with [bold]stillhouse compress recipes/digits.yaml[/bold]; look first with [bold]stillhouse plan[/bold].",
)
app.add_typer(deltas.app, rich_help_panel="Measuring and comparing")
app.add_typer(operating.app)
app.add_typer(bundling.app)
app.add_typer(devices.app, name="devices", rich_help_panel=bundling.DEVICES)
app.add_typer(rollouts.app, name="rollout", rich_help_panel=bundling.DEVICES)
console = Console()
problems = Console(stderr=True)

REJECTED, BAD_INPUT, FAILED, LEFT = 1, 2, 3, 4
RUNNING, LOOKING = "Recipes", "Measuring and comparing"

RecipeArgument = Annotated[
    Path, typer.Argument(help="Recipe file, for example recipes/digits.yaml.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME.NAME=VALUE", help="Override a value of the recipe; may be given several times."
    ),
]


@app.command(
    rich_help_panel=RUNNING,
    epilog="Example: stillhouse compress recipes/digits.yaml --set distill.train.epochs=20 --from distill",
)
def compress(
    recipe: RecipeArgument,
    set_: SetOption = None,
    from_stage: Annotated[
        str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and all after it again.")
    ] = None,
    if_running: Annotated[
        Literal["wait", "leave"], typer.Option(help="What to do when another process runs this recipe.")
    ] = "wait",
) -> None:
    """Run the whole chain on a recipe: teachers, search, distillation, quantization, export, evidence, verdict."""
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")  # the program says it in its own words
    from flows.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    if from_stage is not None:
        _check_stage(from_stage)
    if from_stage is None:
        _stop_if_nothing_to_do(loaded)
    from flows.server import prefect_server

    with prefect_server(console, loaded.name):
        from flows.compress import compress as flow
        from flows.progress import terminal_progress

        with terminal_progress(console):
            summary: Any = flow(loaded, restart_from=cast(Any, from_stage), if_running=if_running)
    _show(summary)


def _stop_if_nothing_to_do(recipe: "Recipe") -> None:
    """Print the kept result and end when every stage of the run is kept: no server, no flow run."""
    from flows.compress import plan as plan_recipe
    from flows.recipe import dump_recipe
    from tasks.run_folder import latest_finished

    stages = plan_recipe(recipe)
    summary = latest_finished(recipe.name, dump_recipe(recipe))
    if summary is not None and not any(stage.is_pending for stage in stages):
        console.print(f"Nothing has changed: all {len(stages)} stages are kept from run {summary['run']}.")
        _show(summary)


def _show(summary: dict) -> None:
    """Print the table, the verdict and where things are, and end with the verdict's exit code."""
    if summary["outcome"] == "left":
        console.print(summary["summary"], markup=False, highlight=False)
        raise typer.Exit(LEFT)
    from export.comparison import console_table
    from tasks.run_folder import read_rows

    folder = Path(summary["folder"])
    title = f"{summary['recipe']} {summary['run']}"
    console.print(console_table(read_rows(folder), title=title, width=console.width))
    accepted = summary["outcome"] == "accept"
    console.print(f"Verdict: [bold {'green' if accepted else 'red'}]{summary['outcome']}[/]. {summary['summary']}")
    for reason in summary["reasons"]:
        console.print(f"  - {reason}", markup=False, highlight=False)
    if summary["registered"]:
        model = summary["registered"]
        console.print(f"Model:   {model['model']} version {model['version']}, alias {model['alias']}")
        _show_promotion(summary.get("promotion") or {})
    console.print(f"MLflow:  run {summary['mlflow_run']} in {summary['mlflow_url']}", soft_wrap=True)
    console.print(f"Report:  {folder / 'report.html'}", soft_wrap=True)
    raise typer.Exit(0 if accepted else REJECTED)


def _show_promotion(promotion: Mapping[str, Any]) -> None:
    """What was decided about the champion, and what a person has to do."""
    if not promotion:
        return
    words = {"promote": "is the champion now", "ask": "waits for a person", "hold": "does not become the champion"}
    console.print(f"Promotion: version {promotion['version']} {words[promotion['decision']]}.", highlight=False)
    for reason in promotion["reasons"]:
        console.print(f"  - {reason}", markup=False, highlight=False)
    if promotion.get("command"):
        console.print(f"  Decide: {promotion['command']}", markup=False, highlight=False)
    if promotion.get("approval"):
        console.print(f"  Decide in the Prefect UI, flow run {promotion['approval']['name']}.", highlight=False)


def _check_stage(name: str) -> None:
    from compression.errors import RecipeError
    from flows.compress import STAGES

    if name not in STAGES:
        raise RecipeError(f"Stage '{name}' does not exist, expected one of: {', '.join(STAGES)}.")


@app.command(rich_help_panel=RUNNING, epilog="Example: stillhouse plan recipes/fashion-mnist.yaml")
def plan(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Show every stage of a run, and which ones are kept from earlier runs; runs nothing."""
    from flows.recipe import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    from flows.compress import plan as plan_recipe

    table = Table("stage", "for", "state", "took before", title=f"Plan of {loaded.name}")
    results = plan_recipe(loaded)
    for result in results:
        state = "[yellow]to do[/]" if result.is_pending else "[green]kept[/]"
        table.add_row(result.stage, result.name, state, "" if result.is_pending else f"{result.seconds:.1f} s")
    console.print(table)
    todo = sum(result.is_pending for result in results)
    console.print(f"{len(results) - todo} stages kept, {todo} to do.")


@app.command(
    rich_help_panel=LOOKING,
    epilog="Examples: stillhouse compare; stillhouse compare digits fashion-mnist --pareto --html all.html; "
    "stillhouse compare --role student --batch 1 --where 'accuracy>=0.9' --sort latency_p50_ms --csv all.csv",
)
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Run folders, <recipe>/<run-id>, or recipes (their newest runs); default: the newest of every recipe."
        ),
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Only rows of this recipe; may be repeated.")] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="Only teacher, student, control, engine or file; may be repeated.")
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Only files for this target; may be repeated.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Only float32, int8, ...; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Only this batch size; may be repeated.")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN>=VALUE", help="Only rows for which this holds; may be repeated."),
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Only the front.")] = False,
    sort: Annotated[str | None, typer.Option(help="Column to sort by; -COLUMN: largest first.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns to show, separated by commas.")] = None,
    all_columns: Annotated[bool, typer.Option("--all-columns", help="Show every column.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this CSV file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with filters, curves and costs.")] = None,
) -> None:
    """Compare the candidates of any runs: one table, the front, the champion."""
    from flows.comparing import compare_runs

    code = compare_runs(
        console,
        runs or (),
        recipes=recipe or (),
        roles=role or (),
        targets=target or (),
        precisions=precision or (),
        batches=batch or (),
        where=where or (),
        front=pareto,
        sort=sort,
        columns=columns,
        all_columns=all_columns,
        as_json=json_,
        csv_path=csv,
        html_path=html,
    )
    raise typer.Exit(code)


@app.command(
    rich_help_panel=RUNNING,
    epilog="Examples: stillhouse methods; stillhouse methods losses; stillhouse methods distill kd; "
    "stillhouse methods selectors --json",
)
def methods(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="Kind of method (losses or loss, combinations, selectors, ...), or a stage: select, search, distill, "
            "sparsify, quantize."
        ),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One method, to see its card and fields.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print cards and fields as JSON, for programs.")] = False,
) -> None:
    """List the methods a recipe can name, and their cards: paper, formula, needs, cost, evidence here."""
    from flows.methods import show_methods

    show_methods(console, kind, name, as_json=json_)


@app.command(
    rich_help_panel=LOOKING,
    epilog="Examples: stillhouse latency 1x28x28; stillhouse latency 3x32x32 --batch 1 --batch 32 --json; "
    "stillhouse latency 1x8x8 CHECKPOINT --device lab-1",
)
def latency(
    size: Annotated[str, typer.Argument(help="Channels, height and width of one image, e.g. 1x28x28.")],
    checkpoints: Annotated[
        list[Path] | None, typer.Argument(help="Checkpoint folders to predict, if any.", show_default=False)
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images per call; may be given several times.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Also show what it takes on this device, by its reports.", show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Measure (once) and show the latency model of this machine, with its error on networks it was not fitted to."""
    from flows.latency import shape_of, show_latency

    batches = tuple(batch or ([32] if device is None else [1]))
    show_latency(console, shape_of(size), batches, tuple(checkpoints or ()), device=device, as_json=json_)


@app.command(
    rich_help_panel=LOOKING,
    epilog="Examples: stillhouse bench float32.onnx int8.onnx; "
    "stillhouse bench text.onnx text-int8.onnx --shape ids=1x128 --batch 1 --operators",
)
def bench(
    files: Annotated[
        list[Path], typer.Argument(help="ONNX files of any tool; the first is the reference.", show_default=False)
    ],
    reference: Annotated[Path | None, typer.Option(help="Compare with this one of the files instead.")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images per call; may be given several times. Default: 1 and 32.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=1x3x224x224", help="Sizes of an input that has open ones beyond the batch; may be repeated."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds; more rounds, narrower noise floor.")] = 30,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each session.")] = 1,
    operators: Annotated[bool, typer.Option("--operators", help="Also show the time per operator.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Also write the table to this CSV file.")] = None,
) -> None:
    """Time ONNX files side by side: did it get faster, and if not, why not and what to do."""
    from flows.bench_files import bench_files

    bench_files(
        console,
        files,
        reference=reference,
        batches=batch or (1, 32),
        rounds=rounds,
        threads=threads,
        shapes=shape or (),
        operators=operators,
        as_json=json_,
        csv_path=csv,
    )


@app.command(
    rich_help_panel=LOOKING,
    epilog="Examples: stillhouse parity model.onnx model-int8.onnx --inputs images.npy --labels labels.npy; "
    "stillhouse parity a.onnx b.onnx --json",
)
def parity(
    a: Annotated[Path, typer.Argument(help="The ONNX file that is right.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The ONNX file in question.", show_default=False)],
    inputs: Annotated[
        Path | None,
        typer.Option(help="Real inputs: .npz with an array per input, or .npy for one; default: random ones."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help=".npy with the right class of every sample.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many random inputs.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Compare two ONNX files, output by output and layer by layer: which layer begins to differ?"""
    from flows.parity import show_parity

    code = show_parity(console, a, b, inputs=inputs, labels=labels, samples=samples, seed=seed, as_json=json_)
    raise typer.Exit(code)


@app.command(rich_help_panel=RUNNING, epilog="Example: stillhouse init my-parts --data /data/parts")
def init(
    name: Annotated[str, typer.Argument(help="Name of the recipe: lower case, digits, dashes.")],
    data: Annotated[Path, typer.Option(help="Folder with one sub-folder of images per class.")] = Path("/data/images"),
    folder: Annotated[Path, typer.Option(help="Where the recipe goes.")] = Path("recipes"),
) -> None:
    """Write a commented recipe for your own images and teachers."""
    from flows.template import write_template

    console.print(f"Wrote {write_template(name, data, folder)}. Edit it, then: stillhouse plan {folder / name}.yaml")


@app.command(rich_help_panel=RUNNING, epilog="Example: stillhouse samples recipes/digits.yaml samples.npz")
def samples(
    recipe: RecipeArgument,
    path: Annotated[Path, typer.Argument(help="The .npz file to write.", show_default=False)],
    set_: SetOption = None,
) -> None:
    """Write the recipe's images with their ids, to ask a black-box teacher about them."""
    from flows.recipe import load_recipe
    from flows.samples import write_samples

    counts = write_samples(load_recipe(recipe, set_ or []), path)
    shown = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    console.print(f"Wrote {path}: ids, images and split of {shown}.")
    console.print(
        "Store the teacher's answers with numpy.savez(file, ids=..., probabilities=...), and name the file in"
    )
    console.print("the recipe: {name: ..., source: {kind: outputs, path: ...}}.", markup=False)


@app.command(rich_help_panel=RUNNING)
def doctor() -> None:
    """Report what works on this machine, what does not and why, and what to install."""
    from flows.doctor import report

    raise typer.Exit(report(console))


@contextmanager
def _explained() -> Iterator[None]:
    """Turn our own errors into one clear message and an exit code."""
    from compression.errors import ArtifactError, InputError, StillhouseError

    try:
        yield
    except StillhouseError as error:
        problems.print(f"[bold red]Error:[/] {type(error).__name__}")
        problems.print(str(error), markup=False, highlight=False, soft_wrap=True)
        for note in getattr(error, "__notes__", []):
            problems.print(note, markup=False, highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT if isinstance(error, InputError | ArtifactError) else FAILED)
    except KeyboardInterrupt:
        problems.print("Interrupted. Finished stages and the last step checkpoint are kept; run again to resume.")
        sys.exit(FAILED)
    except OSError as error:
        problems.print(f"Failed: {error}. Finished stages are kept; run again to resume.", markup=False)
        sys.exit(FAILED)


def main() -> None:
    """Entry point."""
    from tasks.settings import prepare_prefect

    prepare_prefect()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's import warns about itself
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: not record.name.startswith("prefect"))
    with _explained():
        app()


if __name__ == "__main__":
    main()
