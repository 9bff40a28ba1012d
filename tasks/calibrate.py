"""Calibration: one temperature for each form of a model, fitted on the calibration split and on no other."""

from typing import Literal

from compression.calibration import Calibrate, fit_temperature
from compression.checkpoint import load_checkpoint, read_spec
from compression.data import open_dataset
from compression.metrics import predict
from compression.quantize import load_quantized
from tasks.stage import StageOutput, StageResult, Work, stage
from tasks.teachers import MODEL_CODE


@stage(
    "calibrate",
    code=(*MODEL_CODE, "compression.calibration", "compression.metrics", "compression.quantize"),
    libraries=("torch", "torchao"),
)
def calibrate_model(
    work: Work,
    *,
    name: str,
    config: Calibrate,
    model: StageResult,
    which: Literal["float", "int8"],
    data: StageResult,
) -> StageOutput:
    """Fit the temperature of a float checkpoint, or of a quantized student's INT8 form, as ``which`` says.

    ``info["apply"]`` is whether the export is to divide by it: asked for, and nothing speaks against the value.
    """
    dataset = open_dataset(work.open(data))
    folder = work.open(model)
    network = load_checkpoint(folder)[0] if which == "float" else load_quantized(folder).converted
    work.report(f"calibrating {name}", 0, 1)
    logits = predict(network, dataset.calibration, read_spec(folder).preprocessing)
    fitted = fit_temperature(logits, dataset.calibration.labels)
    work.report(f"calibrating {name}", 1, 1)
    facts = {**fitted.model_dump(mode="json"), "which": which, "apply": config.apply and not fitted.note}
    with work.store.put("temperature") as draft:
        (draft.folder / "temperature.json").write_text(fitted.model_dump_json(indent=1))
    return StageOutput(
        artifact=draft.done(),
        metrics={
            "temperature": fitted.value,
            "nll_before": fitted.nll_before,
            "nll_after": fitted.nll_after,
            "ece_before": fitted.ece_before,
            "ece_after": fitted.ece_after,
        },
        info=facts,
    )
