"""The commands bundle and verify, and the golden images that they choose."""

import io
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from compression.augment import normalise
from compression.data import Digits, load_dataset, save_dataset
from compression.errors import ArtifactError
from export.bundle.build import accepted_run
from flows.bundling import golden_images, show_bundle
from tasks.artifacts import Store
from tasks.settings import settings
from tests.export.bundle.accepted import TRUST


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
