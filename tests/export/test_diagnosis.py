"""Each reason why a file is slow is found in a graph that has it, and not in one that is well made."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from export.benchmark import BenchmarkJob, summarize
from export.diagnosis import Diagnosis, DiagnosisReport, compare_files, diagnose, speed_of
from export.evidence import Evidence
from export.file_facts import FileFacts, facts_of, size_of
from export.finding import Finding, Speed
from export.latency import BenchmarkResult, NoiseFloor
from export.operator_profile import operators_of
from export.report.figures_diagnosis import figures, section
from export.runtime import CpuFeatures
from export.shipping import why_not_faster
from export.timing import RAW_COLUMNS, profile
from tasks.artifacts import Store
from tasks.diagnose import diagnose_files
from tasks.stage import StageOutput, StageResult, Work

X86 = CpuFeatures(model="server", machine="x86_64", avx2=True, avx512=True, vnni=True)
OLD = CpuFeatures(model="old", machine="x86_64", avx2=True)
ARM = CpuFeatures(model="board", machine="aarch64", dot_product=True)
SIZE = 12


def write_net(
    path: Path,
    *,
    widths: tuple[int, ...] = (16, 32, 32),
    activation: str = "Relu",
    norm: bool = False,
    identity: bool = False,
    repeat: bool = False,
    groups: int = 1,
    dtype: type = np.float32,
) -> Path:
    """Convolutions 3x3 with activations, mean over the image, a linear layer: layers 'conv0', ..., 'head'."""
    rng = np.random.default_rng(0)
    nodes, stored = [], []

    def keep(name: str, value) -> str:
        stored.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    source, channels = "images", 3
    shared = keep("shared", rng.standard_normal(max(widths)).astype(dtype)) if identity else ""
    for number, width in enumerate(widths):
        layer = f"conv{number}"
        group = groups if number else 1
        weight = rng.standard_normal((width, channels // group, 3, 3)) / (3 * np.sqrt(channels / group))
        if repeat and number == len(widths) - 1:
            weight = numpy_helper.to_array(stored[-2])
        inputs = [source, keep(f"{layer}.weight", weight.astype(dtype))]
        if identity and not number:
            inputs.append(shared)
        elif identity:
            nodes.append(helper.make_node("Identity", [shared], [f"{layer}.bias"], name=f"{layer}/Identity"))
            inputs.append(f"{layer}.bias")
        else:
            inputs.append(keep(f"{layer}.bias", rng.standard_normal(width).astype(dtype)))
        nodes.append(helper.make_node("Conv", inputs, [layer], name=f"{layer}/Conv", pads=[1] * 4, group=group))
        source = layer
        if norm:
            moments = [keep(f"norm{number}.{i}", rng.uniform(0.5, 2, width).astype(dtype)) for i in range(4)]
            name = f"norm{number}"
            nodes.append(helper.make_node("BatchNormalization", [source, *moments], [name], name=f"{name}/BatchNorm"))
            source = name
        if activation:
            made = f"act{number}"
            nodes.append(helper.make_node(activation, [source], [made], name=f"{made}/{activation}"))
            source = made
        channels = width
    nodes.append(helper.make_node("GlobalAveragePool", [source], ["pooled"], name="pool/GlobalAveragePool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], name="pool/Flatten"))
    head = [
        keep("head.weight", rng.standard_normal((10, channels)).astype(dtype)),
        keep("head.bias", np.zeros(10, dtype)),
    ]
    nodes.append(helper.make_node("Gemm", ["flat", *head], ["logits"], name="head/Gemm", transB=1))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("images", kind, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("logits", kind, ["batch", 10])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


class Images(CalibrationDataReader):
    """One batch of noise."""

    def __init__(self) -> None:
        noise = np.random.default_rng(1).standard_normal((8, 3, SIZE, SIZE)).astype(np.float32)
        self._batches = iter([{"images": noise}])

    def get_next(self):
        return next(self._batches, None)


def int8(source: Path, *, signed: bool = False, clean: bool = False, weights_as_floats: bool = False, keep=()) -> Path:
    """The file quantized by ONNX Runtime from its calibration noise."""
    target = source.with_name(f"{source.stem}.int8.onnx")
    if clean:
        quant_pre_process(str(source), str(source), skip_symbolic_shape=True)
    options = {}
    if signed:
        options = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        options["OpTypesToExcludeOutputQuantization"] = ["Conv", "Gemm"]
    if weights_as_floats:
        options |= {"AddQDQPairToWeight": True, "QuantizeBias": False}
    quantize_static(
        str(source),
        str(target),
        Images(),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8 if signed else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        nodes_to_exclude=list(keep),
        extra_options=options,
    )
    return target


def examined(path: Path, **times: float) -> FileFacts:
    """Facts of a file, with the times of its operators replaced: microseconds by kind or by operator, 50 else."""
    job = {"path": str(path), "optimized": str(path.with_suffix(".run")), "threads": 1, "batch": 1}
    found = profile(job | {"shapes": {}, "seed": 0, "seconds": 0.0})
    for node in found["nodes"]:
        node["microseconds"] = 1.0
    found["call_us"] = 1e6
    stored = onnx.load(str(path))
    operators = operators_of(stored, onnx.load(str(path.with_suffix(".run"))), found)
    wanted = {"conversion": 1.0} | times
    micro = [wanted.get(n.operator, wanted.get(n.kind, 50.0)) for n in operators.profile.nodes]
    nodes = tuple(
        node.model_copy(update={"microseconds": each, "share": each / sum(micro)})
        for node, each in zip(operators.profile.nodes, micro, strict=True)
    )
    wide = operators.profile.model_copy(update={"nodes": nodes, "call_us": times.get("call_us", 1e6)})
    operators = operators.model_copy(update={"profile": wide})
    return facts_of(stored, operators, name=path.stem, **size_of(path))


def codes(candidate: FileFacts, reference: FileFacts, *, cpu=X86, speed=None) -> dict[str, Finding]:
    return {finding.code: finding for finding in compare_files(candidate, reference, speed=speed, cpu=cpu).findings}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[FileFacts, FileFacts]:
    """A well-made INT8 file and its float parent."""
    path = write_net(tmp_path_factory.mktemp("good") / "net.onnx")
    return examined(int8(path), float=5.0), examined(path)


# ---------------------------------------------------------------- nothing to find


def test_of_a_good_file_nothing_is_found_and_that_is_said(good):
    candidate, reference = good
    assert candidate.quantization == "static"
    assert candidate.operators.integer_share == 1.0
    found = compare_files(candidate, reference, cpu=X86)
    assert found.findings == ()
    assert found.faster == "not measured"
    assert found.conclusion.startswith("Nothing was found")
    assert compare_files(reference, reference, cpu=X86).findings == ()


# ---------------------------------------------------------------- one fault each


def in_tensorrt_form(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx"), signed=True), float=5.0)


def with_batch_norm(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx", norm=True)), float=5.0)


def with_shared_biases(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx", widths=(32, 32, 32), identity=True)), float=5.0)


def with_hard_swish(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx", activation="HardSwish")), float=5.0)


def with_tanh(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx", activation="Tanh")), float=5.0)


def dynamic(folder: Path) -> FileFacts:
    path = write_net(folder / "net.onnx")
    quantize_dynamic(str(path), str(folder / "dynamic.onnx"), weight_type=QuantType.QInt8)
    return examined(folder / "dynamic.onnx", float=5.0)


def with_integer_weights_only(folder: Path) -> FileFacts:
    proto = onnx.load(str(write_net(folder / "net.onnx")))
    for tensor in [each for each in proto.graph.initializer if each.name.endswith(".weight")]:
        value = numpy_helper.to_array(tensor)
        step = np.float32(np.abs(value).max() / 127)
        tensor.CopyFrom(numpy_helper.from_array(np.rint(value / step).astype(np.int8), tensor.name))
        proto.graph.initializer.append(numpy_helper.from_array(step, f"{tensor.name}.scale"))
        user = next(node for node in proto.graph.node if tensor.name in node.input)
        made = f"{tensor.name}.float"
        user.input[1] = made
        inputs = [tensor.name, f"{tensor.name}.scale"]
        proto.graph.node.insert(0, helper.make_node("DequantizeLinear", inputs, [made], name=f"{made}/Dequantize"))
    onnx.save(proto, str(folder / "weights.onnx"))
    return examined(folder / "weights.onnx")


def in_half_precision(folder: Path) -> FileFacts:
    return examined(write_net(folder / "half.onnx", dtype=np.float16))


def with_float_weights(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx"), weights_as_floats=True), float=5.0)


def with_a_weight_twice(folder: Path) -> FileFacts:
    return examined(write_net(folder / "net.onnx", widths=(16, 32, 32, 32), repeat=True))


def with_weights_beside(folder: Path) -> FileFacts:
    proto = onnx.load(str(write_net(folder / "net.onnx")))
    onnx.save(
        proto, str(folder / "beside.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=100
    )
    return examined(folder / "beside.onnx")


def with_odd_widths(folder: Path) -> FileFacts:
    return examined(write_net(folder / "net.onnx", widths=(16, 27, 32)))


def with_odd_groups(folder: Path) -> FileFacts:
    return examined(write_net(folder / "net.onnx", widths=(16, 24, 32), groups=4))


def with_thin_layers(folder: Path) -> FileFacts:
    return examined(write_net(folder / "net.onnx", widths=(8, 32, 32)))


def with_a_layer_in_float(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx"), keep=["conv1/Conv"]), float=5.0)


def with_dear_conversions(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx")), float=5.0, conversion=500.0)


def with_a_dear_activation(folder: Path) -> FileFacts:
    return examined(int8(write_net(folder / "net.onnx", activation="Tanh")), Tanh=500.0)


def tiny(folder: Path) -> FileFacts:
    return examined(write_net(folder / "net.onnx"), call_us=20.0)


FAULTS = [
    # how to make it, the code, a layer it must name, words of the evidence
    (in_tensorrt_form, "signed_activations", None, "int8 with zero point 0"),
    (in_tensorrt_form, "unfused_quantizers", "conv0", "run as integer kernels"),
    (with_batch_norm, "batch_norm", None, "3 BatchNormalization"),
    (with_shared_biases, "hidden_constants", "conv1", "Identity"),
    (with_hard_swish, "activations_in_float", None, "HardSigmoid operators run in float"),
    (with_tanh, "activations_in_float", "act1", "Tanh operators run in float"),
    (dynamic, "dynamic_quantization", None, "DynamicQuantizeLinear"),
    (with_integer_weights_only, "weights_only", "head", "stored as int8"),
    (in_half_precision, "float16", "conv0", "4 of 4 layers"),
    (with_float_weights, "float_weights", "conv1", "bytes per parameter"),
    (with_a_weight_twice, "duplicate_weights", None, "1 tensors repeat the bytes of another one, 36.0 KiB"),
    (with_weights_beside, "external_data", None, "in files beside it"),
    (with_odd_widths, "odd_channels", "conv1", "1 of 3 convolutions"),
    (with_odd_groups, "odd_channels", "conv1", "'conv1' 6"),
    (with_thin_layers, "thin_layers", "conv0", "1 of 3 convolutions"),
    (with_a_layer_in_float, "kept_in_float", "conv1", "1 of 4 layers"),
    (with_dear_conversions, "conversions_dominate", None, "only convert"),
    (with_a_dear_activation, "float_dominates", "act1", "3 Tanh operators that stayed in float"),
    (tiny, "tiny_net", None, "µs each"),
]


@pytest.mark.parametrize(("make", "code", "layer", "words"), FAULTS, ids=lambda each: getattr(each, "__name__", None))
def test_a_fault_is_found_where_it_is(make, code, layer, words, good, tmp_path):
    candidate, (_, reference) = make(tmp_path), good
    found = codes(candidate, reference)
    assert code in found
    finding = found[code]
    assert words in finding.evidence
    assert layer is None or layer in finding.layers
    assert finding.remedy.endswith(".")
    assert finding.share_of_time is None or 0 <= finding.share_of_time <= 1 + 1e-9
    assert code not in codes(good[0], reference), "the good file has it as well"


def test_batch_norm_that_the_runtime_folds_is_no_fault(tmp_path):
    facts = examined(write_net(tmp_path / "net.onnx", norm=True))
    assert facts.operators.histogram.stored["BatchNormalization"] == 3
    assert codes(facts, facts) == {}


def test_the_remedy_for_hidden_biases_is_one(tmp_path):
    path = write_net(tmp_path / "net.onnx", widths=(32, 32, 32), identity=True)
    repaired = examined(int8(path, clean=True), float=5.0)
    assert repaired.operators.integer_share == 1.0
    assert "hidden_constants" not in codes(repaired, repaired)


def test_widths_do_not_blame_depthwise_layers_or_the_classifier(tmp_path):
    facts = examined(write_net(tmp_path / "net.onnx", widths=(16, 16, 32), groups=16), float=5.0)
    assert [layer.width for layer in facts.layers] == [16, 16, 2, 10]
    assert codes(facts, facts)["odd_channels"].layers == ("conv2",)


def test_what_the_processor_lacks_is_said_of_integer_files_only(good):
    candidate, reference = good
    old = codes(candidate, reference, cpu=OLD)
    assert {"no_dot_product", "saturation"} <= set(old)
    assert "no_dot_product" not in codes(reference, reference, cpu=OLD)
    narrow = candidate.model_copy(update={"wide_weights": False})
    assert "saturation" not in codes(narrow, reference, cpu=OLD), "7 bits cannot overflow"


def test_the_right_form_depends_on_the_processor(good, tmp_path):
    candidate, reference = good
    assert set(codes(candidate, reference, cpu=ARM)) == {"unsigned_activations"}
    signed = codes(in_tensorrt_form(tmp_path), reference, cpu=ARM)
    assert not {"signed_activations", "unsigned_activations"} & set(signed)


def test_a_small_file_that_is_mostly_graph_is_explained(tmp_path):
    path = write_net(tmp_path / "net.onnx", widths=(16, 16))
    found = codes(examined(int8(path), float=5.0), examined(path))
    assert "the rest describes the graph" in found["size_not_shrunk"].evidence


# ---------------------------------------------------------------- speed


@pytest.mark.parametrize(
    ("low", "high", "answer", "words"),
    [
        (0.40, 0.50, "yes", "is faster"),
        (0.90, 0.949, "yes", "is faster"),
        (0.90, 0.95, "cannot tell", "Cannot tell"),
        (0.95, 1.01, "no", "is not faster"),
        (1.06, 1.20, "no", "is slower"),
    ],
)
def test_the_answer_follows_from_interval_and_noise_floor(low, high, answer, words, good):
    speed = Speed(ratio=(low + high) / 2, low=low, high=high, noise_floor=0.05)
    found = compare_files(*good, speed=speed, cpu=X86)
    assert found.faster == answer
    assert words in found.headline
    assert "5.0%" in found.headline
    assert Diagnosis.model_validate_json(found.model_dump_json()) == found


def test_fewer_multiplications_in_the_same_time_are_a_finding(good, tmp_path):
    _, reference = good
    pruned = examined(write_net(tmp_path / "net.onnx", widths=(11, 21, 21)))
    share = pruned.operators.profile.macs / reference.operators.profile.macs
    assert share < 0.6
    same = codes(pruned, reference, speed=Speed(ratio=0.97, low=0.96, high=0.98, noise_floor=0.01))
    assert f"{share:.0%} of the multiplications" in same["pruned_not_faster"].evidence
    assert same["pruned_not_faster"].layers == ("conv0", "conv1", "conv2")
    fast = codes(pruned, reference, speed=Speed(ratio=0.6, low=0.59, high=0.61, noise_floor=0.01))
    assert "pruned_not_faster" not in fast
    assert "pruned_not_faster" not in codes(pruned, reference), "without a measurement nothing is claimed"


def test_findings_that_concern_most_of_the_time_come_first(good, tmp_path):
    found = compare_files(in_tensorrt_form(tmp_path), good[1], cpu=OLD).findings
    weighty = [finding.share_of_time or 0.0 for finding in found if finding.severity != "low"]
    assert len(weighty) > 2
    assert weighty == sorted(weighty, reverse=True)


def test_layers_share_out_multiplications_and_time(good):
    layers = compare_files(*good, cpu=X86).layers
    assert [layer.layer for layer in layers] == ["conv0", "conv1", "conv2", "head"]
    assert sum(layer.macs_share for layer in layers) == pytest.approx(1)
    macs = SIZE * SIZE * 9 * np.array([3 * 16, 16 * 32, 32 * 32])
    assert [layer.macs for layer in layers] == [*macs, 320]


def test_speed_is_taken_round_by_round_between_any_two_files():
    mood = [1.0, 5.0, 1.0, 30.0, 1.0, 2.0, 7.0, 1.0]
    samples = {
        (name, 1): [np.full(5, each * m) for m in mood]
        for name, each in (("teacher", 8.0), ("float", 2.0), ("int8", 1.0))
    }
    floor = NoiseFloor(batch=1, ratio=1.0, ratio_iqr=(1.0, 1.0), spread=0.02)
    timing = BenchmarkResult(reference="teacher", rows=(), noise_floors=(floor,), failures={}, environment={})
    speed = speed_of(samples, timing, "int8", "float", batch=1)
    assert speed is not None
    assert (speed.ratio, speed.low, speed.high, speed.noise_floor) == (0.5, 0.5, 0.5, 0.02)
    assert speed_of(samples, timing, "int8", "absent", batch=1) is None
    assert speed_of(samples, timing, "int8", "float", batch=4) is None


# ---------------------------------------------------------------- who uses it


class Logged:
    """Takes what a stage gives its MLflow run."""

    def __init__(self) -> None:
        self.files: list[str] = []

    def log_file(self, path: Path, folder: str = "") -> None:
        self.files.append(f"{folder}/{path.name}")


@pytest.fixture(scope="module")
def staged(tmp_path_factory) -> tuple[StageOutput, DiagnosisReport, Logged]:
    """The stage on a teacher, a student in three forms of which one is broken, and timings made up."""
    folder = tmp_path_factory.mktemp("stage")
    student = write_net(folder / "student.onnx")
    paths = {
        "teacher-t.float32": write_net(folder / "teacher.onnx", widths=(32, 32, 32)),
        "student-0.float32": student,
        "student-0.int8": int8(student, signed=True),
        "student-0.int8-ptq": folder / "broken.onnx",
    }
    paths["student-0.int8-ptq"].write_bytes(b"no graph")
    store = Store(folder / "store")
    store.prepare()

    def kept(name: str, *files: tuple[str, bytes]) -> StageResult:
        with store.put("thing") as draft:
            for file, content in files:
                (draft.folder / file).write_bytes(content)
        return StageResult(stage="thing", name=name, key=name, artifact=draft.done())

    times = {
        "teacher-t.float32": 8.0,
        "teacher-t.float32 (again)": 8.0,
        "student-0.float32": 2.0,
        "student-0.int8": 4.0,
    }
    job = BenchmarkJob(models=paths, reference="teacher-t.float32", batches=(1,))
    samples = {(name, 1): [np.full(4, each)] * 8 for name, each in times.items()}
    raw = [",".join(RAW_COLUMNS)]
    raw += [f"1,{turn},0,{name},{each}" for turn in range(8) for name, each in times.items() for _ in range(4)]
    result = summarize(job, samples).model_dump_json().encode()
    logged = Logged()
    output = diagnose_files.fn(
        Work(store=store, run=logged, scratch=folder, report=lambda text, done, total: None),
        name="cpu",
        files={name: kept(name, ("model.onnx", path.read_bytes())) for name, path in paths.items()},
        benchmark=kept("timing", ("latency.json", result), ("latency_raw.csv", "\n".join(raw).encode())),
        reference="teacher-t.float32",
        threads=1,
        batch=1,
        machine="here",
    )
    found = (store.open(output.artifact) / "diagnosis.json").read_text()
    return output, DiagnosisReport.model_validate_json(found), logged


def test_the_stage_compares_each_file_with_what_it_was_made_from(staged):
    output, report, logged = staged
    parents = {name: row.parent for name, row in report.files.items()}
    assert parents == {
        "teacher-t.float32": None,
        "student-0.float32": "teacher-t.float32",
        "student-0.int8": "student-0.float32",
        "student-0.int8-ptq": "student-0.float32",
    }
    assert report.files["student-0.float32"].diagnosis.faster == "yes"
    slow = report.files["student-0.int8"].diagnosis
    assert (slow.faster, slow.speed.ratio) == ("no", 2.0)
    assert "expected an ONNX graph" in report.files["student-0.int8-ptq"].failure
    assert output.metrics["student-0.float32/integer_share"] == 0.0
    assert output.info["student-0.int8"]["faster"] == "no"
    assert "signed_activations" in output.info["student-0.int8"]["findings"]
    assert logged.files == ["diagnosis/diagnosis.json"]


def test_the_section_shows_every_file_or_says_not_run(staged):
    kept = json.loads(staged[1].model_dump_json())
    shown = section(kept)["diagnosis"]
    assert [file["name"] for file in shown["files"]] == ["teacher-t.float32", "student-0.float32", "student-0.int8"]
    assert [file.get("badge") for file in shown["files"]] == [None, "pass", "fail"]
    assert "signed_activations" in {finding["code"] for finding in shown["files"][2]["findings"]}
    assert set(shown["failures"]) == {"student-0.int8-ptq"}
    assert section({})["diagnosis"]["files"] == []
    (figure, _), (nothing, _) = (figures(each)["operator_time"] for each in (kept, {}))
    assert nothing is None
    assert sum(patch.get_width() for patch in figure.axes[0].patches) == pytest.approx(3, abs=0.3), "a full bar each"


def test_two_files_are_compared_by_their_paths(tmp_path):
    path = write_net(tmp_path / "net.onnx")
    found = diagnose(path, path, names=("a", "b"), batch=2)
    assert (found.candidate, found.reference, found.batch, found.size_ratio) == ("a", "b", 2, 1.0)


def test_the_gate_gives_the_reasons_of_the_diagnosis(good, tmp_path):
    slow = Evidence(
        target="cpu", candidate="s.int8", precision="int8", latency_p50_ms=2.0, integer_share=0.1, vnni=False
    )
    fast = Evidence(target="cpu", candidate="s.float32", precision="float32", latency_p50_ms=1.0)
    diagnosis = compare_files(in_tensorrt_form(tmp_path), good[1], cpu=X86)
    said = why_not_faster(slow, fast, diagnosis)
    assert said[1:] == [finding.evidence for finding in diagnosis.findings]
    nothing = why_not_faster(slow, fast, compare_files(*good, cpu=X86))
    assert "no single cause" in nothing[1]
    assert "Only 10% of the weight layers" in why_not_faster(slow, fast)[1]
