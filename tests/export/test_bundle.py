"""A bundle comes back as it was, and every other file than exactly it is refused."""

import base64
import hashlib
import io
import json
import random
import re
import struct
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.console import Console
from typer.testing import CliRunner

from compression.augment import normalise
from compression.data import Digits, load_dataset, save_dataset
from compression.errors import ArtifactError
from export.bundle import BundleError
from export.bundle.build import Order, accepted_run, build_bundle, next_seq, reissue
from export.bundle.content import Measured, archive, describe, measure, whole
from export.bundle.envelope import canonical, key_id, seal
from export.bundle.golden import golden_inputs, read_golden, tolerance
from export.bundle.package import BUNDLE_TYPE, HEADER, MAGIC, Package, open_package, write_package
from export.bundle.provenance import open_provenance
from export.bundle.statement import Content, Member, Statement
from export.bundle.trust import make_trust
from export.profiles import build_manifest
from export.targets import OnnxRuntimeTarget, TensorRtRtxTarget, TensorRtTarget
from flows.bundling import app, golden_images, show_bundle
from tasks.artifacts import Store
from tasks.settings import settings
from tests.export.made_up_run import make_run

A, B, C = (Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in range(3))
TRUST = make_trust([A.public_key(), B.public_key()], threshold=2)
CREATED = "2026-11-26T02:11:05Z"
ORDER = Order(seq=7, created=CREATED, keys=(A, B))
DIGEST = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("data", "residual", "outside")}
MUTANTS = 300


def put_target(run: Path, target, files: dict[str, bytes], **facts) -> None:
    """A target's folder, as a run leaves it."""
    place = run / "export" / target.name
    place.mkdir(parents=True)
    for name, data in files.items():
        (place / name).write_bytes(data)
    manifest = build_manifest(target, {name: place / name for name in files}, {"recipe": run.parent.name, **facts})
    (place / "manifest.json").write_text(manifest.model_dump_json())


def put_engines(run: Path, source, target=None, student="student", generations=("SM86", "SM89")) -> None:
    """Engines as they are built on a machine that cannot run them; their bytes are made up."""
    target = target or TensorRtRtxTarget(name="rtx", precision="int8")
    described = json.loads(build_manifest(OnnxRuntimeTarget(), {"a.onnx": source.path}, {}).model_dump_json())
    graph = {key: described[key] for key in ("opset", "input", "output", "preprocessing", "class_names")}
    files = {}
    for generation in generations:
        about = {"backend_version": "1.7.1.116", "compute_capability": generation, "graph": graph}
        about |= {"onnx_sha256": source.sha256, "precision": "int8", "profile": {"images": [[1], [8], [32]]}}
        stem = f"{student}.rtx-{(generation or 'here').lower()}"
        files[f"{stem}.engine"] = f"an engine for {generation}, ".encode() * 100
        files[f"{stem}.json"] = json.dumps(about).encode()
    put_target(run, target, files)


def make_accepted(root: Path, exported) -> Path:
    run = make_run(root)
    lineage = [{"stage": "data", "name": "noise", "output": DIGEST["data"]}]
    lineage += [
        {"stage": "teacher_outputs", "name": name, "output": DIGEST["outside"]} for name in ("residual", "outside")
    ]
    lineage += [{"stage": "teacher", "name": "residual", "output": DIGEST["residual"]}]
    (run / "lineage.json").write_text(json.dumps(lineage))
    (run / "data.json").write_text(json.dumps({"sha256": DIGEST["data"]}))
    packages = {"torch": "2.14.1", "onnx": "1.23.2", "tensorrt": "not installed"}
    (run / "env.json").write_text(
        json.dumps({"python": "3.11.7", "packages": packages, "commit": "3f9c2a1" + "0" * 33})
    )
    (run / "model_card.md").write_text("# A card\n")
    registered = {"registered": {"model": "edge-classifier", "version": 3}, "mlflow_run": "abc"}
    (run / "summary.json").write_text(json.dumps(registered))
    graph = exported.float32.path.read_bytes()
    put_target(
        run,
        OnnxRuntimeTarget(name="cpu", precision="float32"),
        {"model.onnx": graph},
        accepted=True,
        file="student-float32",
    )
    put_target(run, OnnxRuntimeTarget(name="refused", precision="float32"), {"model.onnx": graph}, accepted=False)
    put_engines(run, exported.symmetric, student="student-float32")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory, exported) -> Path:
    return make_accepted(tmp_path_factory.mktemp("run"), exported)


@pytest.fixture(scope="module")
def images(exported) -> np.ndarray:
    return exported.images(8).numpy()


@pytest.fixture(scope="module")
def sources(exported) -> dict[str, Path]:
    return {exported.symmetric.sha256: exported.symmetric.path}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, run, images, sources) -> Package:
    path, notes = build_bundle(accepted_run(run), tmp_path_factory.mktemp("out"), ORDER, images, sources)
    assert notes == ()
    return open_package(path, TRUST)


def test_a_bundle_holds_what_was_accepted_and_what_could_not_be_judged(run, bundle):
    statement = bundle.statement
    assert bundle.path.name == "edge-classifier-7.edgepkg"
    assert bundle.signed_by == {key_id(A.public_key()), key_id(B.public_key())}
    assert [each.path for each in statement.files] == [
        "golden.npz",
        "model_card.md",
        "models/cpu/manifest.json",
        "models/cpu/model.onnx",
        *(
            f"models/rtx/{name}"
            for name in (
                "manifest.json",
                *(f"student-float32.rtx-{sm}.{end}" for sm in ("sm86", "sm89") for end in ("engine", "json")),
            )
        ),
        "provenance.dsse.json",
        "sbom.cdx.json",
    ]
    for each in statement.files:
        if each.path.startswith("models/"):
            assert bundle.read(each.path) == (run / "export" / each.path.removeprefix("models/")).read_bytes()
    assert bundle.read("model_card.md") == b"# A card\n"
    with pytest.raises(BundleError, match="no member 'other'"):
        bundle.read("other")


def test_the_statement_says_what_the_run_says(bundle):
    statement = bundle.statement
    assert (statement.name, statement.version, statement.seq, statement.created) == ("edge-classifier", "3", 7, CREATED)
    assert statement.input.shape == (-1, 1, 12, 12)
    assert statement.labels == ("a", "b", "c", "d")
    assert statement.lineage.teachers == {"residual": DIGEST["residual"], "outside": DIGEST["outside"]}
    assert statement.lineage.data_sha256 == DIGEST["data"]
    assert statement.lineage.mlflow_run == "abc"
    assert statement.lineage.commit == "3f9c2a1" + "0" * 33


def test_engines_come_first_and_each_names_its_gpu_generation(bundle):
    found = [(each.id, each.runtime, each.compute_capability, each.rebuild_from) for each in bundle.statement.variants]
    assert found == [
        ("rtx-sm86", "tensorrt_rtx", "SM86", None),
        ("rtx-sm89", "tensorrt_rtx", "SM89", None),
        ("cpu", "onnxruntime", None, None),
    ]
    assert bundle.statement.variants[0].runtime_versions == "==1.7.1.116"


def by_id(statement, name):
    return next(each for each in statement.variants if each.id == name)


def test_limits_are_what_was_measured_times_the_margin(run, bundle, tmp_path, images, sources):
    row = accepted_run(run).run.latency.row("student-float32", 1)
    limits = by_id(bundle.statement, "cpu").limits
    assert limits.p50_ms == pytest.approx(max(3 * row.latency_p50_ms, 5), abs=1e-6)
    assert limits.p95_ms == pytest.approx(max(3 * row.latency_p95_ms, 5), abs=1e-6)
    assert by_id(bundle.statement, "rtx-sm86").limits.p50_ms is None  # nobody has timed it
    assert limits.startup_s is None
    path, _ = build_bundle(accepted_run(run), tmp_path, Order(7, CREATED, (A, B), margin=0), images, sources)
    assert set(by_id(open_package(path, TRUST).statement, "cpu").limits.model_dump().values()) == {None}


def test_the_same_run_seq_time_and_keys_give_the_same_bytes(run, bundle, tmp_path, images, sources):
    path, _ = build_bundle(accepted_run(run), tmp_path, ORDER, images, sources)
    assert path.read_bytes() == bundle.path.read_bytes()
    other, _ = build_bundle(accepted_run(run), tmp_path / "b", Order(8, CREATED, (B, A)), images, sources)
    assert other.read_bytes() != bundle.path.read_bytes()
    assert open_package(other, TRUST).statement.content == bundle.statement.content


def test_golden_answers_are_those_of_onnx_runtime_on_each_variants_own_graph(bundle, exported, images):
    arrays = read_golden(bundle.read("golden.npz"), bundle.statement)
    inputs = arrays["inputs"]
    assert inputs.shape == (11, 1, 12, 12)
    np.testing.assert_array_equal(inputs[:8], images)
    assert (inputs[8] == 0).all()
    assert (inputs[9] == 1).all()
    assert 0.5 < inputs[10].std() < 1.5
    for name, path in (("cpu", exported.float32.path), ("rtx-sm86", exported.symmetric.path)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: inputs})[0]
        np.testing.assert_allclose(found, arrays[f"outputs-{name}"], rtol=1e-4, atol=1e-4)
    assert np.abs(arrays["outputs-cpu"] - arrays["outputs-rtx-sm86"]).max() > 1e-3
    served = onnxruntime.InferenceSession(bundle.read("models/cpu/model.onnx"), providers=["CPUExecutionProvider"])
    limit = by_id(bundle.statement, "cpu").tolerance
    found, golden = served.run(None, {"images": inputs})[0], arrays["outputs-cpu"]
    np.testing.assert_allclose(found, golden, rtol=limit.rtol, atol=limit.atol)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found[:, ::-1], golden, rtol=limit.rtol, atol=limit.atol)


def test_without_the_engines_graph_the_bundle_says_so_and_its_limits_are_wide(run, bundle, tmp_path, images):
    path, notes = build_bundle(accepted_run(run), tmp_path, ORDER, images)
    statement = open_package(path, TRUST).statement
    assert [note.partition(":")[0] for note in notes] == ["rtx-sm86", "rtx-sm89"]
    assert by_id(statement, "rtx-sm86").tolerance.rtol > by_id(bundle.statement, "rtx-sm86").tolerance.rtol
    assert by_id(statement, "cpu").tolerance == by_id(bundle.statement, "cpu").tolerance


def test_devices_may_rebuild_only_when_told_so_and_get_the_graph_for_it(run, tmp_path, images, sources, exported):
    path, _ = build_bundle(accepted_run(run), tmp_path, Order(7, CREATED, (A, B), rebuild=True), images, sources)
    package = open_package(path, TRUST)
    name = package.statement.variants[0].rebuild_from
    assert name is not None
    assert package.read(name) == exported.symmetric.path.read_bytes()
    wrong = {exported.symmetric.sha256: exported.float32.path}
    with pytest.raises(BundleError, match="other bytes"):
        build_bundle(accepted_run(run), tmp_path / "b", ORDER, images, wrong)


@pytest.mark.parametrize(
    "change",
    [lambda it: it[:7], lambda it: it[:, :, 1:], lambda it: it[0], lambda it: it * np.nan],
    ids=["too few", "another size", "one image", "not a number"],
)
def test_golden_images_that_cannot_be_right_are_refused(images, change):
    with pytest.raises(BundleError, match="Golden images"):
        golden_inputs(change(images), (1, 12, 12))


def test_golden_limits_grow_with_the_coarseness_of_the_form():
    outputs = np.linspace(-5, 5, 40, dtype=np.float32).reshape(10, 4)
    found = [tolerance(outputs, form).rtol for form in ("float32", "float16", "int8", "int8-arm", "fp8")]
    assert found == sorted(found)
    assert tolerance(outputs, "float32", same_form=False).rtol > found[-1]


def test_the_provenance_is_about_exactly_the_models_and_names_what_they_were_made_of(bundle):
    found = open_provenance(bundle.read("provenance.dsse.json"), TRUST, bundle.statement)
    digests = {each["name"]: each["digest"]["sha256"] for each in found["subject"]}
    models = [name for name in bundle.offsets if name.endswith((".onnx", ".engine"))]
    assert digests == {name: hashlib.sha256(bundle.read(name)).hexdigest() for name in models}
    assert (found["_type"], found["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    build, details = found["predicate"]["buildDefinition"], found["predicate"]["runDetails"]
    assert {"buildType", "externalParameters", "resolvedDependencies"} <= build.keys()
    made_of = {each["name"]: each["digest"] for each in build["resolvedDependencies"]}
    assert made_of["data"] == {"sha256": DIGEST["data"]}
    assert made_of["teacher/residual"] == {"sha256": DIGEST["residual"]}
    assert made_of["source"] == {"gitCommit": "3f9c2a1" + "0" * 33}
    assert made_of["recipe.resolved.yaml"]["sha256"] == bundle.statement.lineage.recipe_sha256
    assert details["builder"]["id"].startswith("urn:")
    assert details["metadata"]["invocationId"] == bundle.statement.lineage.run
    fewer = bundle.statement.model_copy(update={"files": bundle.statement.files[:4]})
    with pytest.raises(BundleError, match="subjects"):
        open_provenance(bundle.read("provenance.dsse.json"), TRUST, fewer)
    with pytest.raises(BundleError, match="signature"):
        open_provenance(
            bundle.read("provenance.dsse.json"), make_trust([C.public_key()], threshold=1), bundle.statement
        )


def test_the_bill_of_materials_has_what_cyclonedx_asks_for(bundle):
    found = json.loads(bundle.read("sbom.cdx.json"))
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", found["serialNumber"])
    components = [found["metadata"]["component"], *found["components"]]
    kinds = {"platform", "library", "machine-learning-model"}
    assert all(each["name"] and each["type"] in kinds for each in components)
    refs = [each["bom-ref"] for each in components]
    assert len(set(refs)) == len(refs)
    named = {ref for each in found["dependencies"] for ref in (each["ref"], *each["dependsOn"])}
    assert named <= set(refs)
    libraries = {each["name"]: each["purl"] for each in components if each["type"] == "library"}
    assert libraries == {"torch": "pkg:pypi/torch@2.14.1", "onnx": "pkg:pypi/onnx@1.23.2"}
    hashes = {each["name"]: each["hashes"][0] for each in components if "hashes" in each}
    assert hashes == {each.path: {"alg": "SHA-256", "content": each.sha256} for each in bundle.statement.models()}


def test_a_run_that_was_not_accepted_is_refused_by_the_name_of_its_verdict(run, tmp_path, exported):
    other = make_accepted(tmp_path, exported)
    verdict = json.loads((other / "verdict.json").read_text())
    (other / "verdict.json").write_text(json.dumps(verdict | {"outcome": "regression"}))
    with pytest.raises(BundleError, match="verdict 'regression', expected 'accept'"):
        accepted_run(other)
    (other / "verdict.json").unlink()
    with pytest.raises(BundleError, match="'no verdict'"):
        accepted_run(other)


def test_files_of_other_students_and_engines_for_an_unknown_gpu_are_left_out(tmp_path, exported, images, sources):
    other = make_accepted(tmp_path, exported)
    put_engines(other, exported.symmetric, TensorRtRtxTarget(name="rival", precision="int8"), student="rival")
    unknown = TensorRtTarget(name="orin", precision="int8")
    put_engines(other, exported.symmetric, unknown, student="student-float32", generations=(None,))
    path, notes = build_bundle(accepted_run(other), tmp_path / "out", ORDER, images, sources)
    assert [each.id for each in open_package(path, TRUST).statement.variants] == ["rtx-sm86", "rtx-sm89", "cpu"]
    assert {note.partition(":")[0] for note in notes} == {"rival", "orin"}


def test_targets_that_are_fed_in_different_ways_are_refused(tmp_path, exported, images):
    other = make_accepted(tmp_path, exported)
    path = other / "export" / "rtx" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"preprocessing": {"scale": 255, "mean": [0], "std": [1]}}))
    with pytest.raises(BundleError, match="another preprocessing than 'cpu'"):
        build_bundle(accepted_run(other), tmp_path, ORDER, images)


def test_numbers_only_go_up(run, bundle, tmp_path, images, sources):
    assert next_seq(tmp_path, "edge-classifier") == 1
    assert next_seq(tmp_path, "edge-classifier", "3") == 3
    assert next_seq(bundle.path.parent, "edge-classifier", "3") == 8
    assert next_seq(bundle.path.parent, "edge") == 1
    for seq in (6, 7):
        with pytest.raises(BundleError, match=f"seq {seq}, expected 8 or more"):
            build_bundle(accepted_run(run), bundle.path.parent, Order(seq, CREATED, (A, B)), images, sources)
    (tmp_path / "edge-classifier-x.edgepkg").touch()
    (tmp_path / "edge-classifier-12.edgepkg").touch()
    assert next_seq(tmp_path, "edge-classifier", "3") == 13


def test_an_older_bundle_is_issued_again_under_a_higher_number(bundle, tmp_path):
    order = Order(9, "2026-12-01T00:00:00Z", (B, C))
    path, _ = reissue(bundle, tmp_path, order, TRUST)
    new = open_package(path, make_trust([B.public_key(), C.public_key()], threshold=2))
    assert (new.statement.seq, new.statement.created) == (9, "2026-12-01T00:00:00Z")
    changed = [name for name in new.offsets if new.read(name) != bundle.read(name)]
    assert changed == ["provenance.dsse.json"]
    same, _ = reissue(bundle, tmp_path / "same", Order(9, CREATED, (A, B)), TRUST)
    assert open_package(same, TRUST).statement.content == bundle.statement.content
    with pytest.raises(BundleError, match="seq 7"):
        reissue(bundle, tmp_path / "lower", Order(5, CREATED, (A, B)), TRUST)


def test_a_bundle_that_ran_out_is_refused_only_by_those_who_ask_for_the_time(bundle, tmp_path):
    order = Order(8, CREATED, (A, B), not_after="2026-12-31T00:00:00Z")
    path, _ = reissue(bundle, tmp_path, order, TRUST)
    open_package(path, TRUST)
    open_package(path, TRUST, now="2026-12-31T00:00:00Z")
    with pytest.raises(BundleError, match="valid until 2026-12-31"):
        open_package(path, TRUST, now="2026-12-31T00:00:01Z")


def test_verify_prints_every_check_and_the_model(bundle):
    console = Console(width=160, record=True, file=io.StringIO())
    show_bundle(console, bundle.path, TRUST)
    text = console.export_text()
    checks = ("signatures", "content", "members", "valid", "golden data", "provenance", "bill of materials")
    assert [line.split(":")[0] for line in text.splitlines() if line.startswith("ok ")] == [
        f"ok {each}" for each in checks
    ]
    assert all(each.id in text for each in bundle.statement.variants)
    assert all(each.sha256[:12] in text for each in bundle.statement.files)


def test_every_other_file_than_the_bundle_is_refused(bundle, tmp_path):
    data = bundle.path.read_bytes()
    dice = random.Random(5)
    path = tmp_path / "mutant.edgepkg"
    for number in range(MUTANTS):
        at, end = sorted(dice.sample(range(len(data) + 1), 2))
        if number % 5 < 2:  # the first bytes and the envelope are few: half of the flips go there
            at = dice.randrange(HEADER.size + 4096 if number % 2 else len(data))
            mutant = data[:at] + bytes([data[at] ^ dice.randrange(1, 256)]) + data[at + 1 :]
        else:
            mutant = {
                2: data[:at],
                3: data + dice.randbytes(dice.randrange(1, 100)),
                4: data[:at] + data[end:],
            }[number % 5]
            if number % 10 == 4:
                mutant = data[:at] + data[at : at + 50] + data[at:]
        assert mutant != data
        path.write_bytes(mutant)
        with pytest.raises(BundleError, match=r"mutant\.edgepkg"):
            open_package(path, TRUST)
    path.write_bytes(data)
    open_package(path, TRUST)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: b"PK\3\4" + data, "at its beginning, expected b'EDGEPKG1'"),
        (lambda data: b"", "at its beginning"),
        (lambda data: data[:10], "cut off"),
        (lambda data: data[:100], "bytes of its envelope"),
        (lambda data: data[:-1], "cut off"),
        (lambda data: data + b"\n", "something was appended"),
        (lambda data: data[:8] + b"\xff" * 4 + data[12:], "expected at most 1,048,576"),
        (lambda data: data.replace(b"engine for SM89", b"engine for SM99"), "member 'models/rtx/student.*sm89.engine'"),
        (lambda data: data.replace(b"# A card", b"# A hard"), "member 'model_card.md'"),
    ],
)
def test_a_refusal_names_the_place(bundle, tmp_path, change, says):
    path = tmp_path / "b.edgepkg"
    path.write_bytes(change(bundle.path.read_bytes()))
    with pytest.raises(BundleError, match=says):
        open_package(path, TRUST)


def test_no_file_a_folder_and_a_stranger_are_refused(bundle, tmp_path):
    for place in (tmp_path / "none.edgepkg", tmp_path):
        with pytest.raises(BundleError, match="no file"):
            open_package(place, TRUST)
    with pytest.raises(BundleError, match="signature of key"):
        open_package(bundle.path, make_trust([A.public_key()], threshold=1))
    with pytest.raises(BundleError, match="2 signatures by keys of trust 1, expected 3"):
        open_package(bundle.path, make_trust([A.public_key(), B.public_key(), C.public_key()], threshold=3))


def test_a_member_that_changes_while_it_is_written_is_noticed(tmp_path, bundle):
    moving = tmp_path / "model_card.md"
    moving.write_bytes(b"# A card\n")
    sources = {name: bundle.piece(name) for name in bundle.offsets} | {"model_card.md": whole(moving)}
    members = measure(sources)
    moving.write_bytes(b"# B card\n")
    with pytest.raises(BundleError, match="changed while it was written"):
        write_package(tmp_path / "out" / "a.edgepkg", bundle.statement, members, [A, B])
    assert not list((tmp_path / "out").iterdir())


def test_a_bundle_is_never_overwritten(tmp_path, bundle):
    members = measure({name: bundle.piece(name) for name in bundle.offsets})
    path = tmp_path / "a.edgepkg"
    path.write_bytes(b"something")
    with pytest.raises(BundleError, match="never overwritten"):
        write_package(path, bundle.statement, members, [A, B])
    assert path.read_bytes() == b"something"
    assert [each.name for each in tmp_path.iterdir()] == ["a.edgepkg"]


def test_the_content_is_the_archive_that_the_standard_library_writes(bundle, tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in bundle.offsets:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100644 << 16
            file.writestr(info, bundle.read(name))
    assert bundle.path.read_bytes().endswith(buffer.getvalue())
    assert len(buffer.getvalue()) == bundle.statement.content.length
    with zipfile.ZipFile(bundle.path) as file:
        assert file.testzip() is None
        assert file.namelist() == list(bundle.offsets)


def write_crafted(path: Path, value: dict, content: bytes, keys=(A, B)) -> Path:
    """A bundle by somebody who has the keys: any statement, any content, well signed."""
    value = value | {"content": {"length": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    envelope = seal(canonical(value), BUNDLE_TYPE, keys)
    path.write_bytes(HEADER.pack(MAGIC, len(envelope)) + envelope + content)
    return path


def statement_of(bundle: Package) -> dict:
    return json.loads(canonical(bundle.statement.model_dump(mode="json", by_alias=True)))


def zipped(bundle: Package, change=None, extra=()) -> bytes:
    """The content as the standard library writes it, after a change of the entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name in bundle.offsets:
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100644 << 16
            data = bundle.read(name)
            if change is not None and name == "model_card.md":
                data = change(info) or data
            file.writestr(info, data)
        for name, data in extra:
            file.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def renamed(name):
    def change(info):
        info.filename = name

    return change


def compressed(info):
    info.compress_type = zipfile.ZIP_DEFLATED


def a_link(info):
    info.external_attr = 0o120777 << 16
    return b"/etc/pas"


def executable(info):
    info.external_attr = 0o104755 << 16


def dated(info):
    info.date_time = (2026, 1, 1, 0, 0, 0)


def with_extra(info):
    info.extra = struct.pack("<HH4s", 0x7075, 4, b"evil")


def with_comment(info):
    info.comment = b"hello"


def grown(info):
    return b"# A card, and more"


CONTENTS = {
    "traversal": renamed("../../card.md"),
    "absolute": renamed("/etc/card.md1"),
    "another name": renamed("model_card.MD"),
    "unicode": renamed("model_cärd.md"),
    "NUL": renamed("model\0card.md"),
    "back slashes": renamed("..\\..\\card.m"),
    "compressed": compressed,
    "a symbolic link": a_link,
    "set-uid": executable,
    "another date": dated,
    "an extra field": with_extra,
    "a comment": with_comment,
    "another size": grown,
}


@pytest.mark.parametrize("change", CONTENTS.values(), ids=CONTENTS)
def test_a_well_signed_content_with_an_odd_member_is_refused(bundle, tmp_path, change):
    path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), zipped(bundle, change))
    with pytest.raises(BundleError, match=r"a\.edgepkg"):
        open_package(path, TRUST)


@pytest.mark.parametrize("extra", [("extra", b"x"), ("../x", b"x"), ("model_card.md", b"again")], ids=str)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_well_signed_content_with_a_member_more_is_refused(bundle, tmp_path, extra):
    path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), zipped(bundle, extra=[extra]))
    with pytest.raises(BundleError, match="its files make"):
        open_package(path, TRUST)


def test_a_well_signed_content_with_bytes_before_between_or_after_is_refused(bundle, tmp_path):
    content = zipped(bundle)
    open_package(write_crafted(tmp_path / "good.edgepkg", statement_of(bundle), content), TRUST)
    for other in (b"x" + content, content + b"x", content[:100] + b"x" + content[100:], content[:-1], b""):
        path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), other)
        with pytest.raises(BundleError, match="its files make|wrong content"):
            open_package(path, TRUST)


def test_a_checksum_and_a_list_of_members_that_lie_are_refused(bundle, tmp_path):
    content = bytearray(zipped(bundle))
    last, listed = content.rindex(b"PK\5\6"), content.rindex(b"PK\1\2")
    for at, says in ((14, "CRC"), (listed + 42, "list of members"), (last + 10, "end of the archive")):
        other = bytearray(content)
        other[at] ^= 1
        path = write_crafted(tmp_path / "a.edgepkg", statement_of(bundle), bytes(other))
        with pytest.raises(BundleError, match=says):
            open_package(path, TRUST)


def files_with(*paths):
    """Makes the statement about other paths."""
    rows = [{"path": path, "length": 1, "sha256": "0" * 64} for path in paths]

    def change(value):
        value["files"] = sorted([*value["files"], *rows], key=lambda row: row["path"])

    return change


def variant_with(**fields):
    def change(value):
        value["variants"][0].update(fields)

    return change


STATEMENTS = {
    "a field more": lambda value: value.update(note="hello"),
    "a field of a variant more": variant_with(note="hello"),
    "a field less": lambda value: value.pop("labels"),
    "another schema": lambda value: value.update(schema=2),
    "a schema that is true": lambda value: value.update(schema=True),
    "another kind": lambda value: value.update(kind="agent"),
    "seq 0": lambda value: value.update(seq=0),
    "seq as text": lambda value: value.update(seq="7"),
    "seq with a point": lambda value: value.update(seq=7.0),
    "a name with a slash": lambda value: value.update(name="a/b"),
    "a date that is none": lambda value: value.update(created="2026-02-31T00:00:00Z"),
    "a date with a zone": lambda value: value.update(not_after="2026-01-01T00:00:00+00:00"),
    "traversal": files_with("../x"),
    "traversal inside": files_with("models/../x"),
    "absolute": files_with("/etc/x"),
    "a hidden file": files_with(".x"),
    "an empty part": files_with("a//b"),
    "a folder": files_with("a/"),
    "NUL": files_with("a\0b"),
    "unicode": files_with("ä"),
    "a line end": files_with("a\n"),
    "a back slash": files_with("a\\b"),
    "a drive": files_with("C:x"),
    "deep": files_with("a/b/c/d/e"),
    "long": files_with("a" * 101),
    "the same twice": files_with("golden.npz"),
    "case alone": files_with("Golden.npz"),
    "a file as folder": files_with("golden.npz/x"),
    "too many": files_with(*(f"f{number}" for number in range(256))),
    "too much": lambda value: value["files"][0].update(length=1 << 33),
    "not sorted": lambda value: value["files"].reverse(),
    "a digest in capitals": lambda value: value["files"][0].update(sha256="A" * 64),
    "no variant": lambda value: value.update(variants=[]),
    "a variant without its file": variant_with(file="models/none.engine"),
    "a rebuild from nothing": variant_with(rebuild_from="models/none.onnx"),
    "a variant twice": variant_with(id="cpu"),
    "another runtime": variant_with(runtime="torch"),
    "versions that are a command": variant_with(runtime_versions=">=1; rm -rf /"),
    "golden data that is not there": lambda value: value.update(golden="none.npz"),
    "a variant without tolerance": variant_with(tolerance={}),
    "a limit below zero": lambda value: value["variants"][0]["limits"].update(p50_ms=-1),
    "a smallest batch of 2": variant_with(batches=[2, 8]),
    "a batch that is fixed": lambda value: value["input"].update(shape=[1, 1, 12, 12]),
    "a size with a point": lambda value: value["input"].update(shape=[-1.0, 1, 12, 12]),
    "labels for other classes": lambda value: value.update(labels=["a"]),
    "temperature 0": variant_with(temperature=0),
}


@pytest.mark.parametrize("change", STATEMENTS.values(), ids=STATEMENTS)
def test_a_well_signed_statement_that_makes_no_sense_is_refused(bundle, tmp_path, change):
    value = statement_of(bundle)
    change(value)
    path = write_crafted(tmp_path / "a.edgepkg", value, zipped(bundle))
    with pytest.raises(BundleError, match="statement has"):
        open_package(path, TRUST)


def test_a_well_signed_statement_in_another_spelling_is_refused(bundle, tmp_path):
    payload = json.dumps(statement_of(bundle)).encode()
    envelope = seal(payload, BUNDLE_TYPE, [A, B])
    path = tmp_path / "a.edgepkg"
    path.write_bytes(HEADER.pack(MAGIC, len(envelope)) + envelope + zipped(bundle))
    with pytest.raises(BundleError, match="statement has another spelling"):
        open_package(path, TRUST)


def test_a_signature_for_another_type_is_worth_nothing(bundle, tmp_path):
    data = bundle.path.read_bytes()
    length = HEADER.unpack_from(data)[1]
    value = json.loads(data[HEADER.size : HEADER.size + length])
    sealed = json.loads(seal(base64.b64decode(value["payload"]), "application/vnd.in-toto+json", [A, B]))
    other = canonical(value | {"signatures": sealed["signatures"]})
    path = tmp_path / "a.edgepkg"
    path.write_bytes(HEADER.pack(MAGIC, len(other)) + other + data[HEADER.size + length :])
    with pytest.raises(BundleError, match="wrong signature"):
        open_package(path, TRUST)


def test_an_archive_beyond_32_bits_is_refused_before_it_is_read(tmp_path):
    member = Member(path="a", length=1 << 32, sha256="0" * 64)
    with pytest.raises(BundleError, match="expected at most"):
        describe([Measured(member, 0, b"")])


def test_an_archive_is_described_without_being_kept():
    members = measure({"b": b"2", "a": b"1"})
    data = b"".join(archive(members))
    assert describe(members) == Content(length=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert [each.member.path for each in members] == ["a", "b"]
    assert members[0].crc == zlib.crc32(b"1")


def test_a_statement_reads_what_it_writes(bundle):
    value = canonical(bundle.statement.model_dump(mode="json", by_alias=True))
    assert Statement.model_validate_json(value, strict=True) == bundle.statement


@pytest.fixture
def stillhouse(tmp_path, monkeypatch):
    """The commands, with everything they keep below ``tmp_path``."""
    for name, value in {
        "STILLHOUSE_ROOT": str(tmp_path),
        "STILLHOUSE_HOME": str(tmp_path / "home"),
        "STILLHOUSE_KEYS": str(tmp_path / "keys"),
        "STILLHOUSE_KEY_PASSPHRASE": "correct horse battery",
        "COLUMNS": "200",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("STILLHOUSE_MLFLOW_URI", raising=False)
    settings.cache_clear()
    yield lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    settings.cache_clear()


def test_the_commands_bundle_verify_and_issue_again(run, images, tmp_path, stillhouse):
    out, golden = tmp_path / "out", tmp_path / "golden.npy"
    np.save(golden, images)
    nobody = stillhouse("bundle", run, "--out", out, "--golden", golden)
    assert "no trusted private key" in str(nobody.exception)
    assert stillhouse("keys", "new", "office").exit_code == 0
    done = stillhouse("bundle", run, "--out", out, "--golden", golden)
    assert done.exit_code == 0, done.exception
    assert "not at hand" in done.output
    first = out / "edge-classifier-3.edgepkg"  # as its registered version
    assert stillhouse("verify", first).exit_code == 0
    done = stillhouse("bundle", "--again", first, "--out", out)
    assert "edge-classifier-4.edgepkg" in done.output
    assert (
        stillhouse("verify", out / "edge-classifier-4.edgepkg", "--trust", tmp_path / "keys" / "trust.json").exit_code
        == 0
    )
    for words in ((), (run, "--again", first)):
        assert "one source" in str(stillhouse("bundle", *words, "--out", out).exception)

    (tmp_path / "keys" / "trust.json").rename(tmp_path / "old.json")
    assert stillhouse("keys", "new", "other").exit_code == 0
    assert "signature of key" in str(stillhouse("bundle", "--again", first, "--out", out).exception)
    assert stillhouse("bundle", "--again", first, "--again-trust", tmp_path / "old.json", "--out", out).exit_code == 0
    assert stillhouse("verify", out / "edge-classifier-5.edgepkg").exit_code == 0
    other = stillhouse("bundle", run, "--golden", golden, "--key", tmp_path / "keys" / "office.pem", "--out", out)
    assert "devices would refuse" in str(other.exception)


def test_golden_images_are_validation_images_of_each_class_in_turn(run, stillhouse):
    dataset = load_dataset(Digits(), seed=0)
    with Store(settings().store_dir).put("dataset") as draft:
        save_dataset(dataset, draft.folder)
    kept, accepted = draft.done(), accepted_run(run)
    row = {"stage": "data", "output": kept.sha256, "size_bytes": kept.size_bytes}
    accepted = replace(accepted, run=replace(accepted.run, lineage=[row]))
    found = golden_images(accepted)
    known = normalise(dataset.validation.images, dataset.preprocessing).numpy()
    places = [int(np.flatnonzero((known == image).all(axis=(1, 2, 3)))[0]) for image in found]
    assert len({int(dataset.validation.labels[place]) for place in places}) == len(found) == 8
    gone = replace(accepted, run=replace(accepted.run, lineage=[row | {"output": "0" * 64}]))
    with pytest.raises(ArtifactError, match="missing"):
        golden_images(gone)
