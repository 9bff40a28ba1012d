"""Faults put into a student's forms on purpose: the ladder names the hop, the layer and what is wrong."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from onnx import ModelProto, helper, numpy_helper
from torch import nn

from compression.augment import normalise
from compression.data import Split
from compression.quantize import convert, prepare_qat
from compression.types import Preprocessing
from compression.zoo import ResidualCnn
from export.ladder import Forms, Ladder, climb, layer_rows
from export.onnx_graph import load_graph, metadata_of, save_graph, to_onnx
from export.parity import ENGINE_NOT_RUN, Rung
from export.ptq import quantize_static
from export.qdq import to_u8_activations
from export.report.figures_parity import section
from export.temperature import store_temperature

SHAPE = (3, 8, 8)
PREPROCESSING = Preprocessing(scale=255.0, mean=(0.6, 0.45, 0.3), std=(0.2, 0.25, 0.3))
FORMS = ("float32", "int8-symmetric", "int8", "int8-ptq")
SYMMETRIC, U8 = "ONNX INT8 symmetric", "ONNX INT8 u8"


@dataclass(frozen=True)
class Bench:
    """A student without faults, and where copies with faults go."""

    forms: Forms
    healthy: Ladder

    def with_file(self, form: str, path: Path) -> Ladder:
        return climb("s", replace(self.forms, files={**self.forms.files, form: path}))


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    torch.set_num_threads(1)
    folder: Path = tmp_path_factory.mktemp("student")
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(0, 4, (192,), generator=generator)
    motifs = torch.tensor([160.0, 120.0, 70.0]).reshape(1, 3, 1, 1) + 50 * torch.randn(4, *SHAPE, generator=generator)
    images = motifs[classes] + 20 * torch.randn(192, *SHAPE, generator=generator)
    images = images.clamp(0, 255).to(torch.uint8)
    inputs = normalise(images, PREPROCESSING)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResidualCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8).build(4, SHAPE)
    model.train()
    with torch.no_grad():
        for _ in range(10):
            model(inputs)  # statistics that are not the initial ones
        model.eval()
        fit_head(model, inputs, classes)
    metadata = {"preprocessing": PREPROCESSING.model_dump_json(), "input_shape": json.dumps(SHAPE)}
    files = {form: folder / f"{form}.onnx" for form in FORMS}
    converted = convert(prepare_qat(model, SHAPE, inputs))
    to_onnx(model, files["float32"], input_shape=SHAPE, metadata=metadata)
    to_onnx(converted, files["int8-symmetric"], input_shape=SHAPE, metadata=metadata)
    to_u8_activations(files["int8-symmetric"], files["int8"], weights="uint8")
    quantize_static(files["float32"], files["int8-ptq"], inputs.numpy(), preset="onnxruntime_x86", weights="uint8")
    split = Split(images=images, labels=classes, ids=torch.arange(len(images)))
    forms = Forms(model=model, files=files, split=split, preprocessing=PREPROCESSING, converted=converted)
    return Bench(forms=forms, healthy=climb("s", forms))


@torch.no_grad()
def fit_head(model: nn.Module, inputs: torch.Tensor, classes: torch.Tensor) -> None:
    """Least squares on the pooled features: a classifier that is sure of its answers, without a training."""
    seen: list[torch.Tensor] = []
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(inputs)
    handle.remove()
    features = torch.cat([seen[0], torch.ones(len(inputs), 1)], dim=1)
    wanted = 8.0 * nn.functional.one_hot(classes, 4) - 4.0
    found = torch.linalg.solve(features.T @ features + 1e-2 * torch.eye(features.shape[1]), features.T @ wanted)
    head.weight.copy_(found[:-1].T)
    head.bias.copy_(found[-1])


def broken(source: Path, target: Path, damage: Callable[[ModelProto], None]) -> Path:
    proto = load_graph(source)
    damage(proto)
    save_graph(proto, target)
    return target


def constant_of(proto: ModelProto, node: str, position: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the stored tensor that a node reads."""
    name = next(each for each in proto.graph.node if each.name == node).input[position]
    tensor = next(each for each in proto.graph.initializer if each.name == name)
    found = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(found.copy()).astype(found.dtype), name))


def outcomes(ladder: Ladder) -> dict[str, str]:
    return {rung.name.removeprefix("s: "): rung.outcome for rung in ladder.rungs}


def exceeded(ladder: Ladder) -> list[str]:
    return [name for name, outcome in outcomes(ladder).items() if outcome == "exceeded"]


def first_layer(ladder: Ladder, label: str) -> str | None:
    attribution = ladder.rung(label).attribution
    assert attribution is not None
    return attribution.first


def test_without_a_fault_every_rung_is_ok(bench: Bench):
    assert set(outcomes(bench.healthy).values()) == {"ok"}
    assert list(outcomes(bench.healthy)) == [
        *("reference inputs", "torch float32", "ONNX float32", "torch fake-quant"),
        *("ONNX INT8 symmetric", "ONNX INT8 u8", "ONNX INT8 after training"),
    ]
    assert bench.healthy.sentence.startswith("All 5 hops are within their limits")
    for rung in bench.healthy.rungs[2:]:
        assert rung.attribution is not None
        assert rung.attribution.matched_by == "layer name"
        assert rung.attribution.matched == rung.attribution.reference_layers == rung.attribution.candidate_layers == 4
        assert rung.attribution.worst is not None
        assert rung.floor is not None
    rows = layer_rows([bench.healthy])
    assert {row["layer"] for row in rows} >= {"input", "stem.0", "blocks.0.first.0", "blocks.0/Add", "head"}


def test_a_patched_weight_is_found_in_its_file_and_layer(bench: Bench, tmp_path: Path):
    def damage(proto: ModelProto) -> None:
        constant_of(proto, "blocks.0.second.0/Conv", 1, lambda weight: weight * np.float32(1.5))

    path = broken(bench.forms.files["float32"], tmp_path / "m.onnx", damage)
    ladder = bench.with_file("float32", path)
    assert exceeded(ladder) == ["ONNX float32"]
    assert first_layer(ladder, "ONNX float32") == "blocks.0.second.0"
    assert ladder.sentence.startswith("ONNX float32")
    assert "the error starts at 'blocks.0.second.0'" in ladder.sentence


def test_a_wrong_activation_scale_is_found_even_where_few_answers_change(bench: Bench, tmp_path: Path):
    def damage(proto: ModelProto) -> None:
        constant_of(proto, "blocks.0.first.2/QuantizeLinear", 1, lambda scale: scale * 4)

    ladder = bench.with_file("int8-symmetric", broken(bench.forms.files["int8-symmetric"], tmp_path / "m.onnx", damage))
    assert exceeded(ladder) == [SYMMETRIC]
    assert first_layer(ladder, SYMMETRIC) == "blocks.0.first.0"


def test_a_wrong_weight_scale_of_one_channel_is_found(bench: Bench, tmp_path: Path):
    def damage(proto: ModelProto) -> None:
        def one_channel(scale: np.ndarray) -> np.ndarray:
            scale[2] *= 4
            return scale

        constant_of(proto, "blocks.0.first.0/DequantizeLinear", 1, one_channel)

    ladder = bench.with_file("int8-symmetric", broken(bench.forms.files["int8-symmetric"], tmp_path / "m.onnx", damage))
    assert exceeded(ladder) == [SYMMETRIC]
    assert first_layer(ladder, SYMMETRIC) == "blocks.0.first.0"


def test_a_wrong_zero_point_in_the_u8_form_is_found(bench: Bench, tmp_path: Path):
    def damage(proto: ModelProto) -> None:
        node = next(each for each in proto.graph.node if each.name == "blocks.0.second.0/QuantizeLinear")
        proto.graph.initializer.append(numpy_helper.from_array(np.array(0, np.uint8), "wrong"))
        for each in proto.graph.node:
            if each is node or (each.op_type == "DequantizeLinear" and each.input[0] == node.output[0]):
                each.input[2] = "wrong"

    ladder = bench.with_file("int8", broken(bench.forms.files["int8"], tmp_path / "m.onnx", damage))
    assert exceeded(ladder) == [U8]
    assert first_layer(ladder, U8) == "blocks.0.second.0"


@pytest.mark.parametrize("where", ["weights", "input"])
def test_swapped_channels_are_found_and_called_so(bench: Bench, tmp_path: Path, where: str):
    def damage(proto: ModelProto) -> None:
        if where == "weights":
            constant_of(proto, "stem.0/Conv", 1, lambda weight: weight[:, ::-1])
        else:
            proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "order"))
            proto.graph.node[0].input[0] = "turned"
            proto.graph.node.insert(0, helper.make_node("Gather", ["images", "order"], ["turned"], name="g", axis=1))

    ladder = bench.with_file("float32", broken(bench.forms.files["float32"], tmp_path / "m.onnx", damage))
    assert exceeded(ladder) == ["ONNX float32"]
    assert first_layer(ladder, "ONNX float32") == "stem.0"
    assert "RGB and BGR" in ladder.rung("ONNX float32").note


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ("", "no preprocessing"),
        (Preprocessing(scale=1.0, mean=(0.0,) * 3, std=(1.0,) * 3).model_dump_json(), "scale 1 mean (0, 0, 0)"),
        (PREPROCESSING.model_copy(update={"mean": (0.3, 0.45, 0.6)}).model_dump_json(), "mean (0.3, 0.45, 0.6)"),
    ],
)
def test_a_missing_or_different_preprocessing_is_found_before_any_hop(bench: Bench, tmp_path: Path, stored, words):
    proto = load_graph(bench.forms.files["int8"])
    metadata = metadata_of(bench.forms.files["int8"]) | {"preprocessing": stored}
    save_graph(proto, tmp_path / "m.onnx", metadata=metadata if stored else {"lineage": "x"})
    ladder = bench.with_file("int8", tmp_path / "m.onnx")
    assert exceeded(ladder) == ["reference inputs"]
    problems = ladder.rung("reference inputs").exceeded
    assert problems[0].startswith("file 's.int8' has")
    assert words in problems[0]
    assert any("answers change" in problem for problem in problems), "the raw images really gave other answers"
    assert ladder.sentence.startswith("The files don't get the inputs")


def test_ranges_calibrated_on_images_that_were_not_normalised_are_found_in_torch(bench: Bench):
    raw = bench.forms.split.images.float()
    wrong = convert(prepare_qat(bench.forms.model, SHAPE, raw))
    only = {"float32": bench.forms.files["float32"]}
    ladder = climb("s", replace(bench.forms, converted=wrong, files=only))
    assert exceeded(ladder) == ["torch fake-quant"]
    assert first_layer(ladder, "torch fake-quant") == "input"
    assert "torch fake-quant loses" in ladder.sentence


def test_a_file_that_divides_by_its_temperature_is_no_fault(bench: Bench, tmp_path: Path):
    paths = {}
    for form in ("float32", "int8"):
        paths[form] = tmp_path / f"{form}.onnx"
        store_temperature(bench.forms.files[form], paths[form], 2.5, apply=True)
    ladder = climb("s", replace(bench.forms, files=paths))
    assert set(outcomes(ladder).values()) == {"ok"}
    forgotten = load_graph(paths["float32"])
    metadata = {"preprocessing": PREPROCESSING.model_dump_json()}
    save_graph(forgotten, paths["float32"], metadata=metadata)
    ladder = climb("s", replace(bench.forms, files=paths))
    assert exceeded(ladder) == ["ONNX float32"]
    assert first_layer(ladder, "ONNX float32") == "head"


def test_the_report_shows_every_rung_with_its_outcome_and_the_sentence_first(bench: Bench, tmp_path: Path):
    def damage(proto: ModelProto) -> None:
        constant_of(proto, "head/Gemm", 1, lambda weight: weight * np.float32(0.5))

    ladder = bench.with_file("float32", broken(bench.forms.files["float32"], tmp_path / "m.onnx", damage))
    engine = Rung(name="engine s.rtx", against=None, parity=None, status=ENGINE_NOT_RUN)
    content = ladder.model_dump(mode="json")
    content["rungs"].append(engine.model_dump(mode="json"))
    found = section([json.loads(json.dumps(content))])
    (shown,) = found["parity_ladders"]
    assert shown["sentence"] == ladder.sentence
    assert [rung["outcome"] for rung in shown["rungs"]] == [*outcomes(ladder).values(), "not run"]
    assert "<svg" in shown["plot"]
    assert "blocks.0/Add" in shown["plot"]
    macros = "{% macro absent(what) %}{{ what }}{% endmacro %}{% include 'sections/parity."
    environment = Environment(loader=FileSystemLoader("export/report"), undefined=StrictUndefined, autoescape=True)
    for kind in ("html", "md"):
        page = environment.from_string(f"{macros}{kind}.jinja' %}}").render(found)
        assert page.count("exceeded") == 1
        assert "ONNX INT8 after training" in page
        assert "layer &#39;head&#39; adds" in page
        assert "not run" in environment.from_string(f"{macros}{kind}.jinja' %}}").render(section([])).lower()


def test_a_model_that_cannot_be_captured_keeps_its_ladder_without_layers(bench: Bench):
    class Odd(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images) if float(images.sum()) != 0.25 else images

    only = {"float32": bench.forms.files["float32"]}
    ladder = climb("s", replace(bench.forms, model=Odd(bench.forms.model), converted=None, files=only))
    assert outcomes(ladder)["ONNX float32"] == "ok"
    assert ladder.rung("ONNX float32").attribution is None
    assert "Layers were not compared" in ladder.rung("torch float32").note
