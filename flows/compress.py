"""From teachers to a verdict on what may ship. Read this first.

``story`` is the whole chain; it sees handles, never tensors. ``compress`` runs it as a Prefect flow, ``plan`` looks
every stage up and runs nothing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tasks.settings import prepare_prefect

prepare_prefect()

from prefect import flow  # noqa: E402
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.client.schemas.objects import State  # noqa: E402
from prefect.runtime import flow_run  # noqa: E402
from prefect.states import Completed  # noqa: E402
from pydantic import Field  # noqa: E402

from compression.data import check_source  # noqa: E402
from compression.errors import ExportError, RecipeError  # noqa: E402
from compression.teacher_outputs import OutputsSpec  # noqa: E402
from compression.teachers import FromCheckpoint, FromOutputs, check_teacher  # noqa: E402
from export.comparison import COLUMNS  # noqa: E402
from export.comparison import show as show_cell  # noqa: E402
from export.formats import NOT_RUN_HERE  # noqa: E402
from export.profiles import Form, forms_of, runs_here  # noqa: E402
from export.targets import OnnxRuntimeTarget, OpenVinoTarget, TensorRtRtxTarget  # noqa: E402
from flows.cancelling import cancellable  # noqa: E402
from flows.fan_out import ahead  # noqa: E402
from flows.fan_out import check as check_fan_out  # noqa: E402
from flows.form import RecipeChoice, resolve  # noqa: E402
from flows.progress import show  # noqa: E402
from flows.promotion import promote_candidate  # noqa: E402
from flows.recipe import Recipe, dump_recipe  # noqa: E402
from flows.reconcile import settle_before  # noqa: E402
from tasks import tracking  # noqa: E402
from tasks.artifacts import Store, file_digest  # noqa: E402
from tasks.attention import compare_attention  # noqa: E402
from tasks.calibrate import calibrate_model  # noqa: E402
from tasks.data import prepare_data, source_digest  # noqa: E402
from tasks.diagnose import diagnose_files  # noqa: E402
from tasks.distill import distill_student  # noqa: E402
from tasks.evaluate import benchmark_files, evaluate_files  # noqa: E402
from tasks.export import export_engine, export_graph, export_openvino  # noqa: E402
from tasks.gate import can_register, judge, register  # noqa: E402
from tasks.machine import engine_backend, int8_weights, machine_digest, set_threads  # noqa: E402
from tasks.prefect_runner import PrefectRunner, UiProgress  # noqa: E402
from tasks.progress import Report  # noqa: E402
from tasks.quantize import quantize_student  # noqa: E402
from tasks.robustness import measure_robustness  # noqa: E402
from tasks.run_folder import read_rows, save_summary, write_run_folder  # noqa: E402
from tasks.running import AlreadyRunning, IfRunning, running  # noqa: E402
from tasks.search import check_device, search  # noqa: E402
from tasks.sensitivity import measure_sensitivity  # noqa: E402
from tasks.settings import settings  # noqa: E402
from tasks.sparsify import sparsify_student  # noqa: E402
from tasks.stage import DirectRunner, PlanRunner, StageIndex, StageResult, use_runner  # noqa: E402
from tasks.teachers import make_teacher, select_teachers, store_outputs  # noqa: E402

Results = dict[str, StageResult]


@dataclass
class Outcome:
    """Every handle of a run, by role and name."""

    data: StageResult
    teachers: Results
    selection: StageResult
    search: StageResult
    students: Results = field(default_factory=dict)
    controls: Results = field(default_factory=dict)
    sensitivities: Results = field(default_factory=dict)
    quantized: Results = field(default_factory=dict)
    temperatures: Results = field(default_factory=dict)
    files: Results = field(default_factory=dict)
    unrun: Results = field(default_factory=dict)
    """Graphs that no runtime of this machine executes."""
    failures: dict[str, str] = field(default_factory=dict)
    """File -> why it could not be made."""
    engines: Results = field(default_factory=dict)
    evaluation: StageResult | None = None
    robustness: StageResult | None = None
    attention: StageResult | None = None
    benchmark: StageResult | None = None
    diagnosis: StageResult | None = None
    verdict: StageResult | None = None
    registered: StageResult | None = None


SOURCE_OF: dict[Form, Form] = {
    **{"int8": "int8-symmetric", "int8-arm": "int8-symmetric"},
    **{"int8-ptq": "float32", "bfloat16": "float32", "int4": "float32", "fp8": "float32"},
}
"""Form of a graph -> the form it is an edit of; the others are exported from the model."""

OPTIONAL_FORMS: tuple[Form, ...] = ("int4", "fp8", "bfloat16")
"""Forms that not every network can have."""

StageName = Literal[
    "data",
    "teacher",
    "teacher_outputs",
    "select",
    "search",
    "distill",
    "sparsify",
    "sensitivity",
    "quantize",
    "calibrate",
    "export",
    "engine",
    "openvino",
    "evaluate",
    "robustness",
    "attention",
    "benchmark",
    "diagnose",
    "gate",
    "register",
]
RestartFrom = Annotated[StageName, Field(title="this stage")] | Annotated[None, Field(title="what has changed")]
STAGES: tuple[str, ...] = get_args(StageName)
"""Stage names in order, as ``restart_from`` takes them."""


def story(recipe: Recipe) -> Outcome:
    """The chain of stages. Each takes handles and returns one; nothing flows backward."""
    seed, augment, machine = recipe.seed, recipe.augment, machine_digest()

    data = prepare_data(
        name=recipe.data.kind,
        config=recipe.data,
        source=source_digest(recipe.data),
        seed=seed,
        unlabelled=recipe.unlabelled,
        unlabelled_source=source_digest(recipe.unlabelled) if recipe.unlabelled is not None else "",
    )

    ahead(recipe, [("teacher", teacher.name) for teacher in recipe.teachers])
    teachers: Results = {
        teacher.name: make_teacher(
            name=teacher.name,
            teacher=teacher,
            weights=file_digest(teacher.source.path)
            if isinstance(teacher.source, FromCheckpoint | FromOutputs)
            else "",
            data=data,
            augment=augment,
            seed=seed,
        )
        for teacher in recipe.teachers
    }

    classes = {teacher.name: teacher.classes for teacher in recipe.teachers}
    models = {teacher.name: teachers[teacher.name] for teacher in recipe.teachers if teacher.model is not None}

    def outputs_of(name: str, views: int, features: bool = False) -> StageResult:
        spec = OutputsSpec(views=views, seed=seed, augment=augment, features=features, classes=classes[name])
        return store_outputs(name=name, teacher=teachers[name], data=data, spec=spec)

    first_look = {name: outputs_of(name, views=0) for name in teachers}
    selection = select_teachers(name="panel", config=recipe.select, outputs=first_look, data=data)
    chosen = selection.info.get("panel", list(teachers)[: recipe.select.panel_size])
    panel = {name: outputs_of(name, recipe.distill.views, recipe.distill.teacher_features) for name in chosen}

    best = best_of(models)
    parent = None
    if recipe.sensitivity is not None and any(space.wants_sensitivity for space in recipe.search.spaces):
        parent = measure_sensitivity(
            name=f"teacher-{best}", config=recipe.sensitivity, model=models[best], data=data, seed=seed
        )
    found = search(
        name=recipe.search.kind,
        config=recipe.search,
        distillation=recipe.distill,
        teachers=models,
        best_teacher=best,
        panel=panel,
        data=data,
        augment=augment,
        machine=machine,
        seed=seed,
        sensitivity=parent,
    )
    outcome = Outcome(data=data, teachers=teachers, selection=selection, search=found)
    if parent is not None:
        outcome.sensitivities[f"teacher-{best}"] = parent

    finalists = range(len(found.info.get("finalists", range(recipe.search.finalists))))
    ahead(recipe, [("student", finalist) for finalist in finalists])
    for finalist in finalists:
        _finish_student(recipe, outcome, f"student-{finalist}", finalist, panel)

    for name, teacher in models.items():
        outcome.files[f"teacher-{name}.float32"] = export_graph(
            name=f"teacher-{name}.float32",
            model=teacher,
            data=data,
            form="float32",
            teachers={},
            temperature=fitted_temperature(recipe, outcome, f"teacher-{name}", teacher),
        )
    outcome.evaluation = evaluate_files(
        name="test",
        data=data,
        files=outcome.files,
        students=outcome.students,
        quantized=outcome.quantized,
        engines=outcome.engines,
        unrun=outcome.unrun,
        machine=machine,
    )
    reference = f"teacher-{best}.float32"
    if recipe.robustness is not None:
        outcome.robustness = measure_robustness(
            name="test",
            config=recipe.robustness,
            data=data,
            files=outcome.files,
            reference=reference,
            machine=machine,
            seed=seed,
        )
    if recipe.attention is not None:
        outcome.attention = compare_attention(
            name="validation",
            config=recipe.attention,
            teacher=models[best],
            students=outcome.students,
            quantized={student: outcome.files[f"{student}.int8-symmetric"] for student in outcome.quantized},
            data=data,
            seed=seed,
        )
    cpu = [target for target in recipe.targets if isinstance(target, OnnxRuntimeTarget) and runs_here(target)]
    for_others = {"int8-symmetric", "int8-arm", "int8", "fp8"} - set(forms_of(OnnxRuntimeTarget()))
    timed = {name: result for name, result in outcome.files.items() if name.partition(".")[2] not in for_others}
    outcome.benchmark = benchmark_files(
        name="cpu",
        files=timed,
        reference=reference,
        batches=tuple(sorted({batch for target in cpu for batch in target.batch_sizes})),
        threads=cpu[0].threads,
        rounds=recipe.benchmark_rounds,
        machine=machine,
        seed=seed,
    )
    outcome.diagnosis = diagnose_files(
        name="cpu",
        files=timed,
        benchmark=outcome.benchmark,
        reference=reference,
        threads=cpu[0].threads,
        batch=cpu[0].batch_sizes[0],
        machine=machine,
    )
    outcome.verdict = judge(
        name=recipe.name,
        policy=recipe.policy,
        targets=recipe.targets,
        best_teacher=best,
        students=tuple(outcome.students),
        files=outcome.files,
        engines=outcome.engines,
        data=data,
        evaluation=outcome.evaluation,
        benchmark=outcome.benchmark,
        diagnosis=outcome.diagnosis,
        robustness=outcome.robustness,
        seed=seed,
    )
    if can_register(outcome.verdict.info):
        outcome.registered = register(
            name=recipe.name,
            verdict=outcome.verdict,
            targets=recipe.targets,
            files=outcome.files,
            data=data,
            evaluation=outcome.evaluation,
            benchmark=outcome.benchmark,
            lineage=outcome.verdict.key,
        )
    return outcome


def best_of(teachers: Results) -> str:
    """The teacher most accurate on the validation split (the first one while that is still pending)."""
    return max(teachers, key=lambda name: teachers[name].metrics.get("accuracy", 0.0))


def _finish_student(recipe: Recipe, outcome: Outcome, name: str, finalist: int, panel: Results) -> None:
    """Distil, quantize and export one finalist, with its control arms."""
    seed, augment, data, config = recipe.seed, recipe.augment, outcome.data, recipe.distill
    teachers = {f"teacher.{teacher}": outcome.teachers[teacher].artifact.sha256 for teacher in panel}

    def graph(base: str, form: Form, model: StageResult, temperature: StageResult | None) -> None:
        """Write one file, from the model or from the graph that it is an edit of; a failure is a row, not an end."""
        file, source = f"{base}.{form}", SOURCE_OF.get(form)
        try:
            made = export_graph(
                name=file,
                model=model,
                data=data,
                form=form,
                int8_weights=int8_weights() if form in ("int8", "int8-ptq") else None,
                teachers=teachers,
                source=outcome.files[f"{base}.{source}"] if source else None,
                temperature=None if source else temperature,
            )
        except ExportError as error:
            if form not in OPTIONAL_FORMS:
                raise
            outcome.failures[file] = str(error)
            return
        (outcome.unrun if form in NOT_RUN_HERE else outcome.files)[file] = made

    def trained(arm: str, taught_by: Results) -> StageResult:
        return distill_student(
            name=arm,
            config=config,
            search=outcome.search,
            finalist=finalist,
            panel=taught_by,
            teachers={name: outcome.teachers[name] for name in taught_by} if config.needs_teachers else {},
            data=data,
            augment=augment,
            seed=seed,
            files={str(path): file_digest(path) for path in config.files if taught_by},
        )

    files = outcome.files
    wanted = forms_wanted(recipe)
    student = trained(name, panel)
    if recipe.sparsify is not None:
        outcome.controls[f"{name}-dense"] = student
        graph(f"{name}-dense", "float32", student, fitted_temperature(recipe, outcome, f"{name}-dense", student))
        student = sparsify_student(
            name=name,
            config=recipe.sparsify,
            distillation=config,
            student=student,
            panel=panel,
            data=data,
            augment=augment,
            seed=seed,
        )
    outcome.students[name] = student
    temperature = fitted_temperature(recipe, outcome, name, student)
    for form in wanted:
        if SOURCE_OF.get(form, form) != "int8-symmetric":
            graph(name, form, student, temperature)
    if config.control:
        control = trained(f"{name}-control", {})
        outcome.controls[f"{name}-control"] = control
        graph(f"{name}-control", "float32", control, fitted_temperature(recipe, outcome, f"{name}-control", control))
    if recipe.sensitivity is not None:
        outcome.sensitivities[name] = measure_sensitivity(
            name=name, config=recipe.sensitivity, model=student, data=data, seed=seed
        )
    if recipe.quantize is not None:
        quantized = quantize_student(
            name=name,
            config=recipe.quantize,
            distillation=config,
            student=student,
            panel=panel,
            data=data,
            augment=augment,
            seed=seed,
            sensitivity=outcome.sensitivities.get(name) if recipe.quantize.control is not None else None,
        )
        outcome.quantized[name] = quantized
        temperature = fitted_temperature(recipe, outcome, name, quantized, which="int8")
        for form in wanted:
            if SOURCE_OF.get(form, form) == "int8-symmetric":
                graph(name, form, quantized, temperature)
    for target in recipe.targets:
        if isinstance(target, OnnxRuntimeTarget):
            continue
        form = forms_of(target)[-1]
        source = outcome.unrun.get(f"{name}.{form}") or files.get(f"{name}.{form}")
        if source is None:
            continue  # its graph could not be made, which is a row
        if isinstance(target, OpenVinoTarget):
            outcome.engines[f"{name}.{target.name}"] = export_openvino(
                name=f"{name}.{target.name}",
                target=target,
                graph=source,
                data=data,
                backend=engine_backend(target.kind),
            )
            continue
        capabilities = target.compute_capabilities if isinstance(target, TensorRtRtxTarget) else (None,)
        for capability in capabilities:
            engine = f"{name}.{target.name}" + (f"-{capability.lower()}" if capability else "")
            outcome.engines[engine] = export_engine(
                name=engine,
                target=target,
                graph=source,
                input_shape=tuple(data.info.get("input_shape", ())),
                compute_capability=capability,
                backend=engine_backend(target.kind),
            )


def forms_wanted(recipe: Recipe) -> list[Form]:
    """The forms every student is written in, sources first: what targets ask for, and the control arms."""
    forms: set[Form] = {"float32"}
    if recipe.quantize is not None:
        forms |= {"int8-ptq", "int8-symmetric", forms_of(OnnxRuntimeTarget())[-1]}
    for target in recipe.targets:
        forms |= set(forms_of(target))
    forms |= {SOURCE_OF[form] for form in forms if form in SOURCE_OF}
    return sorted(forms, key=lambda form: (form in SOURCE_OF, form))


def fitted_temperature(
    recipe: Recipe, outcome: Outcome, name: str, model: StageResult, which: str = "float"
) -> StageResult | None:
    """The temperature of a form of a model, if the recipe asks for one."""
    if recipe.calibrate is None:
        return None
    found = calibrate_model(
        name=f"{name}.{which}", config=recipe.calibrate, model=model, which=which, data=outcome.data
    )
    outcome.temperatures[f"{name}.{which}"] = found
    return found


def preflight(recipe: Recipe) -> Store:
    """Refuse what can be refused before any compute: data, weights, store, disk.

    Raises:
        InputError: dataset or teacher weights are absent or unusable.
        ArtifactError: the store or the MLflow database cannot be written, or the disk is full.
    """
    check_fan_out()
    if recipe.search is not None:
        check_device(recipe.search)
    check_source(recipe.data)
    if recipe.unlabelled is not None:
        check_source(recipe.unlabelled)
    for teacher in recipe.teachers:
        check_teacher(teacher)
    for path in recipe.distill.files:
        if not path.is_file():
            raise RecipeError(f"File '{path}' that distill names does not exist. Correct the path, or write the file.")
    for target in recipe.targets:
        if target.kind != "onnxruntime":
            engine_backend(target.kind)
    if not any(runs_here(target) for target in recipe.targets):
        raise RecipeError(
            "targets has no onnxruntime entry for this machine's CPU, expected one. Add one of isa native."
        )
    store = Store(settings().store_dir)
    store.prepare(min_free_bytes=settings().min_free_mib * 2**20)
    return store


def plan(recipe: Recipe) -> list[StageResult]:
    """Every stage in order, with what is kept from earlier runs; runs nothing."""
    store = preflight(recipe)
    runner = PlanRunner(StageIndex(store))
    with use_runner(runner):
        story(recipe)
    return runner.results


@flow(name="compress", flow_run_name="compress-{recipe.name}")
def compress(
    recipe: RecipeChoice, restart_from: RestartFrom = None, if_running: IfRunning = "wait"
) -> dict[str, Any] | State[dict[str, Any]]:
    """Take teachers to a verified edge model.

    Args:
        recipe: What to run: a recipe file by its name, with changes for this run, or a whole recipe written out.
        restart_from: Restart from this stage: kept results of it and of all stages after it are not used. None: only
            what has changed is done again.
        if_running: When another run of this recipe is under way, wait for its end, or leave at once.

    The state says how it ended: Accepted, Rejected, or Left.
    """
    whole = resolve(recipe)
    in_ui = UiProgress()

    def report(text: str, done: int, total: int) -> None:
        in_ui(text, done, total)
        show(text, done, total)

    try:
        summary = run_recipe(
            whole, report=report, runner=PrefectRunner, restart_from=restart_from, if_running=if_running
        )
    except AlreadyRunning as error:
        left = {"recipe": whole.name, "outcome": "left", "summary": str(error)}
        return Completed(name="Left", message=str(error), data=left)
    summary["promotion"] = promote_candidate(whole.name, whole.promotion, Path(summary["folder"]))
    save_summary(summary)
    publish(whole.name, summary)
    accepted = summary["outcome"] == "accept"
    message = f"{summary['summary'][:900]}\nReport: {Path(summary['folder']) / 'report.html'}"
    return Completed(name="Accepted" if accepted else "Rejected", message=message, data=summary)


def publish(name: str, summary: dict[str, Any]) -> None:
    """Table, report and MLflow link as artifacts of the flow run."""
    folder = Path(summary["folder"])
    main = [column for column in COLUMNS if column.main]
    rows = [
        {column.title: show_cell(row.get(column.name), column.kind) for column in main} for row in read_rows(folder)
    ]
    create_table_artifact(key=f"comparison-{name}", table=rows, description=f"Every file of {name}, measured")
    create_markdown_artifact(key=f"report-{name}", markdown=(folder / "report.md").read_text(), description="Report")
    if summary["mlflow_url"].startswith("http"):
        create_link_artifact(key="mlflow-run", link=summary["mlflow_url"], link_text="This run in MLflow")
    else:
        text = f"Run `{summary['mlflow_run']}` in `{summary['mlflow_url']}`; `stillhouse up` serves it as a page."
        create_markdown_artifact(key="mlflow-run", markdown=text, description="This run in MLflow")


def run_recipe(
    recipe: Recipe,
    *,
    report: Report = lambda text, done, total: None,
    runner: type[DirectRunner] = DirectRunner,
    restart_from: str | None = None,
    if_running: IfRunning = "wait",
) -> dict[str, Any]:
    """Carry the story out, write the run folder and return its summary (JSON).

    Raises:
        AlreadyRunning: another process runs this recipe, and ``if_running`` is "leave".
    """
    store = preflight(recipe)
    set_threads(settings().threads)
    tags = {"recipe": recipe.name}
    if restart_from is not None:
        tags[tracking.RESTART_FROM] = restart_from
    if flow_run.id:
        tags |= {
            "prefect.flow_run_id": str(flow_run.id),
            "prefect.flow_run_name": str(flow_run.name),
            "mlflow.note.content": f"[Prefect flow run]({flow_run.ui_url})",
        }
    flow_run_id = tags.get("prefect.flow_run_id")
    with (
        cancellable(),
        running(recipe.name, flow_run_id=flow_run_id, if_running=if_running, report=report) as lease,
        tracking.recipe_run(recipe.name, {"recipe": recipe}, tags) as parent,
    ):
        lease.note(mlflow_run=parent.id)
        if flow_run_id is not None:
            settle_before(recipe.name, flow_run_id)
        runs = runner(index=StageIndex(store), parent_run=parent, report=report, force_from=restart_from)
        with use_runner(runs):
            outcome = story(recipe)
        content = recipe.model_dump(mode="json")
        summary = write_run_folder(content, dump_recipe(recipe), outcome, runs.results, store, parent)
        save_summary(summary)
        return summary
