"""Robust weight signatures: at a right angle to the clean fine-tuning, put in and taken off, and shipped as a delta."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.deltas import apply_delta, compose, load_delta, weights_sha256
from compression.errors import CheckpointError, CompressionError
from compression.models import ModelSpec
from compression.robustness.signatures import (
    Signature,
    mean_signature,
    patch,
    patched,
    signature,
    signature_delta,
    without_direction,
    write_patch,
)
from compression.types import Preprocessing
from compression.zoo import PlainCnn
from flows.deltas import apply_deltas
from tests.compression.tiny_data import CLASSES

SPEC = ModelSpec(
    model=PlainCnn(widths=(6, 8), depths=(1, 1), strides=(2, 1), stem_width=4),
    num_classes=len(CLASSES),
    input_shape=(1, 8, 8),
    class_names=CLASSES,
    preprocessing=Preprocessing(scale=255.0, mean=(0.3,), std=(0.2,)),
)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SPEC.model.build(SPEC.num_classes, SPEC.input_shape).eval()


@torch.no_grad()
def tuned(model: nn.Module, seed: int, *, spread: float = 0.1) -> nn.Module:
    """A copy with every weight and statistic moved at random, as a training would."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for name, value in result.state_dict().items():
        if value.is_floating_point():
            change = spread * torch.randn(value.shape, generator=generator)
            value.add_(change.abs() if name.endswith("running_var") else change)
        else:
            value.add_(seed)
    return result


START = network()
CLEAN, FOGGY, NOISY = (tuned(START, seed) for seed in (1, 2, 3))


def vectors(*models: nn.Module) -> list[Tensor]:
    """Per layer (weight and bias) the difference of the second to the first model, float64."""
    before, after = (model.state_dict() for model in models)
    layers = [(name, module) for name, module in models[0].named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [
        torch.cat(
            [(after[f"{name}.{own}"].double() - before[f"{name}.{own}"]).flatten() for own, _ in m.named_parameters()]
        )
        for name, m in layers
    ]


def of(found: Signature) -> list[Tensor]:
    names = list(dict.fromkeys(name.rpartition(".")[0] for name in found.layers))
    return [
        torch.cat([value.flatten() for name, value in found.layers.items() if name.rpartition(".")[0] == layer])
        for layer in names
    ]


def test_every_layer_is_at_a_right_angle_to_the_clean_fine_tuning_and_the_rest_is_kept():
    found = of(signature(START, CLEAN, FOGGY))
    clean, corrupted = vectors(START, CLEAN), vectors(START, FOGGY)
    assert len(found) == len(clean) == 4
    for own, a, t in zip(found, clean, corrupted, strict=True):
        assert abs(float(own.dot(a))) <= 1e-12 * float(own.norm() * a.norm())
        torch.testing.assert_close(own + a * (a.dot(t) / a.dot(a)), t, rtol=0, atol=1e-12)
        assert own.norm() > 0.5 * t.norm()


def test_a_corruption_that_teaches_what_the_task_teaches_leaves_no_signature():
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(500, generator=generator, dtype=torch.float64)
    for factor in (1.0, -0.3, 7.0):
        assert without_direction(factor * direction, direction).norm() < 1e-13
    other = torch.randn(500, generator=generator, dtype=torch.float64)
    assert torch.equal(without_direction(other, torch.zeros_like(other)), other)
    parallel = copy.deepcopy(START)
    with torch.no_grad():
        for name, value in parallel.state_dict().items():
            if value.is_floating_point():
                value.add_(2 * (CLEAN.state_dict()[name] - value))
    found, clean = of(signature(START, CLEAN, parallel)), vectors(START, CLEAN)
    assert all(float(own.norm() / a.norm()) < 1e-6 for own, a in zip(found, clean, strict=True))  # float32 weights


def test_only_the_first_layers_and_their_batch_norm_are_touched():
    found = signature(START, CLEAN, FOGGY, keep_layers=2)
    assert {name.rpartition(".")[0] for name in found.layers} == {"stem.0", "blocks.0.0"}
    assert {name.rpartition(".")[0] for name in found.norms} == {"stem.1", "blocks.0.1"}
    kinds = {name.rpartition(".")[2] for name in found.norms}
    assert kinds == {"weight", "bias", "running_mean", "running_var"}
    before, after = CLEAN.state_dict(), patch(CLEAN.state_dict(), found)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(found.changes)
    assert not any(name.startswith(("head", "blocks.1")) for name in changed)


def test_batch_norm_becomes_that_of_the_corruption_at_1_and_lies_between_below():
    found = signature(START, CLEAN, FOGGY, keep_layers=1)
    clean, corrupted = CLEAN.state_dict(), FOGGY.state_dict()
    whole, half = patch(clean, found), patch(clean, found, 0.5)
    for name in found.norms:
        torch.testing.assert_close(whole[name], corrupted[name], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(half[name], (clean[name] + corrupted[name]) / 2, rtol=1e-5, atol=1e-6)


def test_0_is_the_network_bit_for_bit_and_what_was_put_in_comes_off():
    found, before = signature(START, CLEAN, FOGGY), CLEAN.state_dict()
    same = patch(before, found, 0.0)
    assert list(same) == list(before)
    assert all(torch.equal(same[name], before[name]) for name in before)
    for alpha in (0.3, 1.0):
        restored = patch(patch(before, found, alpha), found, -alpha)
        for name, value in before.items():
            torch.testing.assert_close(restored[name], value, rtol=1e-6, atol=1e-6)
    assert weights_sha256(patched(CLEAN, found, 0.0)) == weights_sha256(CLEAN)


def test_strength_is_linear_and_the_mean_of_two_is_half_of_both():
    fog, noise = signature(START, CLEAN, FOGGY), signature(START, CLEAN, NOISY)
    both, before = patch(CLEAN.state_dict(), mean_signature([fog, noise])), CLEAN.state_dict()
    for name in fog.layers:
        wanted = before[name].double() + (fog.layers[name] + noise.layers[name]) / 2
        torch.testing.assert_close(both[name].double(), wanted, rtol=1e-6, atol=1e-7)
    assert mean_signature([fog]).layers.keys() == fog.layers.keys()
    with pytest.raises(CompressionError, match="Mean of 0 signatures"):
        mean_signature([])
    with pytest.raises(CompressionError, match="layers that differ"):
        mean_signature([fog, signature(START, CLEAN, FOGGY, keep_layers=1)])


def test_as_a_delta_it_gives_the_patched_network_and_its_way_back():
    found, model = signature(START, CLEAN, FOGGY, keep_layers=2), copy.deepcopy(CLEAN)
    back = apply_delta(model, signature_delta(CLEAN, found, 0.7))
    assert weights_sha256(model) == weights_sha256(patched(CLEAN, found, 0.7))
    apply_delta(model, back)
    assert weights_sha256(model) == weights_sha256(CLEAN)
    assert not signature_delta(CLEAN, found, 0.0).whole


def test_deltas_of_two_corruptions_add_up():
    halves = [signature_delta(CLEAN, signature(START, CLEAN, each), 0.5) for each in (FOGGY, NOISY)]
    model = copy.deepcopy(CLEAN)
    apply_delta(model, compose(CLEAN, halves))
    mean = mean_signature([signature(START, CLEAN, each) for each in (FOGGY, NOISY)])
    for name, value in patch(CLEAN.state_dict(), mean).items():
        if name not in mean.norms:
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_checkpoints_become_a_file_that_the_delta_command_puts_in(tmp_path: Path):
    for name, model in (("start", START), ("clean", CLEAN), ("fog", FOGGY), ("noise", NOISY)):
        save_checkpoint(model, SPEC, tmp_path / name)
    out = tmp_path / "patch.safetensors"
    corrupted = [tmp_path / "fog", tmp_path / "noise"]
    size = write_patch(tmp_path / "start", tmp_path / "clean", corrupted, out, alpha=0.5, keep_layers=1)
    assert out.stat().st_size == size
    assert set(load_delta(out).whole) >= {"stem.0.weight"}
    apply_deltas(tmp_path / "clean", [out], tmp_path / "patched")
    mean = mean_signature([signature(START, CLEAN, each, keep_layers=1) for each in (FOGGY, NOISY)])
    wanted = patched(load_checkpoint(tmp_path / "clean")[0], mean, 0.5)
    assert weights_sha256(load_checkpoint(tmp_path / "patched")[0]) == weights_sha256(wanted)


def test_what_does_not_belong_together_is_refused():
    wider = PlainCnn(widths=(6, 9), depths=(1, 1), strides=(2, 1), stem_width=4).build(4, (1, 8, 8))
    with pytest.raises(CheckpointError, match=r"Corrupted network has .* Signatures need networks of one structure"):
        signature(START, CLEAN, wider)
    found = signature(START, CLEAN, FOGGY)
    with pytest.raises(CheckpointError, match="Patched network has"):
        patch(wider.state_dict(), found)
    with pytest.raises(CompressionError, match="keep_layers 0, expected 1 or more"):
        signature(START, CLEAN, FOGGY, keep_layers=0)
    shrunk = tuned(CLEAN, 4, spread=0.0)
    for name, value in shrunk.state_dict().items():
        if name.endswith("running_var"):
            value.mul_(0.1)
    with pytest.raises(CompressionError, match=r"Patch with alpha 3.* has a variance of"):
        patch(CLEAN.state_dict(), signature(START, CLEAN, shrunk), 3.0)
