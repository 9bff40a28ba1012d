"""A bundle holds what its run accepted, says what the run says, and comes out the same each time."""

import hashlib
import json
import re

import numpy as np
import onnxruntime
import pytest

from export.bundle import BundleError
from export.bundle.build import Order, accepted_run, build_bundle, next_seq, reissue
from export.bundle.envelope import key_id
from export.bundle.golden import golden_inputs, read_golden, tolerance
from export.bundle.package import open_package
from export.bundle.provenance import open_provenance
from export.bundle.trust import make_trust
from export.targets import TensorRtRtxTarget, TensorRtTarget
from tests.export.bundle.accepted import CREATED, DIGEST, ORDER, TRUST, A, B, C, make_accepted, put_engines


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
    latency = accepted_run(run).run.latency
    assert latency is not None
    row = latency.row("student-float32", 1)
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
        found = np.asarray(session.run(None, {session.get_inputs()[0].name: inputs})[0])
        np.testing.assert_allclose(found, arrays[f"outputs-{name}"], rtol=1e-4, atol=1e-4)
    assert np.abs(arrays["outputs-cpu"] - arrays["outputs-rtx-sm86"]).max() > 1e-3
    served = onnxruntime.InferenceSession(bundle.read("models/cpu/model.onnx"), providers=["CPUExecutionProvider"])
    limit = by_id(bundle.statement, "cpu").tolerance
    found, golden = np.asarray(served.run(None, {"images": inputs})[0]), arrays["outputs-cpu"]
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
