"""States on disk survive damage, and cannot do any."""

import hashlib
import io
import logging
import pickle
from pathlib import Path

import pytest
import torch

from compression.errors import ArtifactError
from compression.train.step_checkpoint import load_state, save_state


def test_comes_back_bit_for_bit_with_layout(tmp_path):
    value = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    save_state({"weights": {"a": value}, "epoch": 3, "rows": [{"loss": 0.1}], "none": None}, tmp_path, step=7)
    state = load_state(tmp_path)
    assert state is not None
    assert torch.equal(state["weights"]["a"], value)
    assert state["weights"]["a"].stride() == value.stride()
    assert (state["epoch"], state["rows"], state["none"]) == (3, [{"loss": 0.1}], None)


def test_nothing_there_is_none(tmp_path):
    assert load_state(tmp_path) is None
    assert load_state(tmp_path / "absent") is None


@pytest.mark.parametrize("damage", ["truncate", "empty", "flip"])
def test_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, caplog, damage):
    save_state({"value": torch.tensor(1)}, tmp_path, step=1)
    newest = save_state({"value": torch.tensor(2)}, tmp_path, step=2)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"truncate": content[: len(content) // 2], "empty": b"", "flip": content}[damage])
    (tmp_path / "step-0000000003-0123456789abcdef.tmp").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        state = load_state(tmp_path)
    assert state is not None
    assert state["value"] == 1
    assert newest.name in caplog.text
    assert not list(tmp_path.glob("*.tmp"))


def test_checkpoint_that_cannot_be_written_says_why(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(ArtifactError, match="expected a writable folder"):
        save_state({"value": torch.tensor(1)}, blocked, step=1)


def test_checkpoint_cannot_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    buffer = io.BytesIO()
    torch.save({"model": Payload()}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    (tmp_path / f"step-0000000009-{digest}.pt").write_bytes(buffer.getvalue())
    with pytest.raises(pickle.UnpicklingError):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()
