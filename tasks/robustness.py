"""Stage 10, beside the evaluation: accuracy of the exported files on corrupted test images."""

import json
from collections.abc import Mapping

from compression.data import open_dataset
from compression.errors import CompressionError
from compression.robustness.accuracy import RobustnessConfig, corruption_answers, robustness_of
from export.profiles import open_as_meant
from export.runtime import predict_fn
from tasks.stage import StageOutput, StageResult, Work, stage


@stage(
    "robustness",
    code=(
        *("compression.robustness", "compression.augment", "compression.metrics", "compression.statistics"),
        *("export.runtime", "export.profiles"),
    ),
    libraries=("torch", "numpy", "onnxruntime-gpu"),
)
def measure_robustness(
    work: Work,
    *,
    name: str,
    data: StageResult,
    files: Mapping[str, StageResult],
    reference: str,
    config: RobustnessConfig,
    machine: str,
    seed: int,
) -> StageOutput:
    """Run ONNX files on corrupted test images through ONNX Runtime; every file sees the same ones.

    This is evidence on the exported files and decides nothing about their training, so it reads the test split, as
    the evaluation does. ``robustness.json`` holds a :class:`~compression.robustness.accuracy.Robustness` per file, and
    of each but ``reference`` the paired interval by which its gap is wider.

    Args:
        name: Of the stage's run.
        data: The dataset.
        files: Name -> exported graph.
        reference: Which of ``files`` the others are compared with, the best teacher's.
        config: Which corruptions.
        machine: Digest of the machine: what an integer file answers may depend on it.
        seed: Of the corruptions and of the bootstrap.

    Raises:
        CompressionError: ``reference`` is not one of the files.
        ExportError: ONNX Runtime refuses a graph.
    """
    if reference not in files:
        raise CompressionError(
            f"Reference '{reference}' has no file, expected one of {', '.join(files)}. Correct its name."
        )
    dataset = open_dataset(work.open(data))
    models = {file: predict_fn(open_as_meant(work.open(result) / "model.onnx")) for file, result in files.items()}
    answers = corruption_answers(
        models,
        dataset.test,
        dataset.preprocessing,
        config,
        seed,
        on_progress=lambda done, total: work.report("corrupting images", done, total),
    )
    found = {
        file: robustness_of(each, config, reference=None if file == reference else answers[reference], seed=seed)
        for file, each in answers.items()
    }
    content = {
        "reference": reference,
        "config": config.model_dump(mode="json"),
        "files": {file: each.model_dump(mode="json") for file, each in found.items()},
    }
    with work.store.put("robustness") as draft:
        path = draft.folder / "robustness.json"
        path.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        work.run.log_file(path)
    metrics = {}
    for file, each in found.items():
        metrics[f"{file}/corrupted_accuracy"] = each.corrupted_accuracy
        metrics[f"{file}/robust_gap"] = each.robust_gap
    return StageOutput(artifact=draft.done(), metrics=metrics, info={"reference": reference})
