"""Sparse deltas restore what they changed bit for bit, add up, refuse other networks, and travel as one file."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.deltas import (
    Delta,
    apply_delta,
    compose,
    delta_of,
    largest_changes,
    load_delta,
    maskable,
    save_delta,
    weights_sha256,
)
from compression.errors import ArtifactError, CheckpointError, InputError
from compression.models import ModelSpec
from compression.types import Preprocessing
from compression.zoo import PlainCnn
from flows.deltas import app
from tests.compression.losses.short_training import assert_same
from tests.compression.tiny_data import CLASSES

SPEC = ModelSpec(
    model=PlainCnn(widths=(6,), depths=(1,), strides=(2,), stem_width=4),
    num_classes=len(CLASSES),
    input_shape=(1, 8, 8),
    class_names=CLASSES,
    preprocessing=Preprocessing(scale=255.0, mean=(0.3,), std=(0.2,)),
)
CONVOLUTIONS = ["stem.0.weight", "blocks.0.0.weight"]


def base_of(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SPEC.model.build(SPEC.num_classes, SPEC.input_shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.fill_(0.5)
    return model.eval()


def tuned_from(base: nn.Module, seed: int, *, entries: int = 30) -> nn.Module:
    """A copy with ``entries`` of its convolutions' weights moved, and all that is trained fully."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        flat = torch.cat([parameter.flatten() for parameter in maskable(model).values()])
        places = torch.randperm(len(flat), generator=generator)[:entries]
        flat[places] += torch.randn(entries, generator=generator)
        start = 0
        for parameter in maskable(model).values():
            parameter.copy_(flat[start : start + parameter.numel()].reshape(parameter.shape))
            start += parameter.numel()
        model.head.weight.add_(torch.randn(model.head.weight.shape, generator=generator))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.add_(torch.randn(module.weight.shape, generator=generator))
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.01, 0.3, generator=generator)
                module.num_batches_tracked.fill_(seed)
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def applied(base: nn.Module, delta: Delta) -> nn.Module:
    model = copy.deepcopy(base)
    apply_delta(model, delta)
    return model


# ---------------------------------------------------------------- what is in one


def test_maskable_is_all_but_classifier_and_norms():
    assert list(maskable(base_of())) == CONVOLUTIONS
    assert list(maskable(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Conv2d(2, 4, 1)))) == [
        "0.weight",
        "0.bias",
    ]
    assert maskable(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("keep", [1, 7, 30])
def test_keeps_exactly_k_entries_those_that_changed_most(keep):
    base = base_of()
    tuned = tuned_from(base, 1)
    delta = delta_of(base, tuned, keep=keep)
    found = applied(base, delta)
    before, after, end = (torch.cat([each.flatten() for each in maskable(m).values()]) for m in (base, found, tuned))
    moved = after != before
    assert delta.count == int(moved.sum()) == keep
    assert torch.equal(after[moved], end[moved])
    change = (end - before).abs()
    assert change[moved].min() >= change[~moved].max()
    for name in ("head.weight", "blocks.0.1.weight", "blocks.0.1.running_mean", "stem.1.num_batches_tracked"):
        assert torch.equal(found.state_dict()[name], tuned.state_dict()[name])


def test_of_equal_changes_the_first_are_kept():
    before = {"a": torch.zeros(2, 2), "b": torch.zeros(3)}
    after = {"a": torch.ones(2, 2), "b": torch.tensor([1.0, -2.0, 1.0])}
    masks = largest_changes(before, after, 3)
    assert masks["a"].tolist() == [[True, True], [False, False]]
    assert masks["b"].tolist() == [False, True, False]
    assert all(mask.all() for mask in largest_changes(before, after, 99).values())
    assert largest_changes({}, {}, 3) == {}


def test_without_a_limit_it_gives_the_tuned_network_bit_for_bit():
    base = base_of()
    tuned = tuned_from(base, 1)
    with torch.no_grad():
        tuned.stem[0].weight.view(-1)[0] = -0.0
        base.stem[0].weight.view(-1)[0] = 0.0
    delta = delta_of(base, tuned)
    found = applied(base, delta)
    assert delta.count in (30, 31)  # the zero may be one of the 30
    assert weights_sha256(found) == weights_sha256(tuned)
    assert_same(found.state_dict(), tuned.state_dict())
    assert delta_of(base, base).count == 0
    assert delta_of(base, base).whole == {}


def test_more_than_what_changed_is_not_kept():
    base = base_of()
    assert delta_of(base, tuned_from(base, 1), keep=10_000).count == 30


def test_shared_parameters_are_changed_under_all_their_names():
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2))
        model[2].weight = model[0].weight
        return model

    base, tuned = tied(), tied()
    delta = delta_of(base, tuned)
    assert list(delta.indices) == ["0.weight", "0.bias", "2.bias"]
    assert list(delta.whole) == ["3.weight", "3.bias"]
    back = apply_delta(base, delta)
    assert_same(base.state_dict(), tuned.state_dict())
    assert apply_delta(base, back).base_sha256 == delta.base_sha256


# ---------------------------------------------------------------- there and back


def test_the_way_back_restores_every_bit_where_subtracting_would_not():
    base = base_of()
    with torch.no_grad():
        base.stem[0].weight.view(-1)[0] = 1e-20
        base.stem[0].weight.view(-1)[1] = -0.0
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.stem[0].weight.view(-1)[:2] = 3.0
        tuned.stem[1].running_mean.add_(1.0)
    delta, before, digest = delta_of(base, tuned), state_of(base), weights_sha256(base)
    model = copy.deepcopy(base)
    back = apply_delta(model, delta)
    assert weights_sha256(model) == weights_sha256(tuned) == back.base_sha256
    there = apply_delta(model, back)
    assert weights_sha256(model) == digest
    assert_same(model.state_dict(), before)
    assert there.sha256 == delta.sha256
    new, old = (each.stem[0].weight.detach().view(-1)[0] for each in (tuned, base))
    assert float(new - (new - old)) == 0.0 != float(old), "a difference would lose it"


def test_a_sum_of_deltas_is_taken_back_bit_for_bit():
    base = base_of()
    deltas = [delta_of(base, tuned_from(base, seed, entries=100)) for seed in (1, 2, 3)]
    before, model = state_of(base), copy.deepcopy(base)
    back = apply_delta(model, compose(base, deltas))
    assert not torch.equal(model.stem[0].weight, base.stem[0].weight)
    apply_delta(model, back)
    assert_same(model.state_dict(), before)
    assert weights_sha256(model) == weights_sha256(base)


def test_composed_is_the_start_plus_the_sum_of_differences():
    base = base_of()
    many = [tuned_from(base, seed, entries=100) for seed in (1, 2, 3)]
    merged = compose(base, [delta_of(base, each) for each in many])
    found, start = applied(base, merged).state_dict(), base.state_dict()
    overlaps = 0
    for name in (*CONVOLUTIONS, "head.weight", "stem.1.weight", "stem.1.running_mean"):
        changed = torch.stack([each.state_dict()[name] for each in many]).double() - start[name].double()
        torch.testing.assert_close(
            found[name].double(), start[name].double() + changed.sum(dim=0), rtol=0, atol=1e-6, msg=name
        )
        alone = (changed != 0).sum(dim=0) == 1
        overlaps += int(((changed != 0).sum(dim=0) > 1).sum())
        for each, change in zip(many, changed, strict=True):
            mine = alone & (change != 0)
            assert torch.equal(found[name][mine], each.state_dict()[name][mine])
    assert overlaps
    assert int(found["stem.1.num_batches_tracked"]) == 3


def test_variances_of_a_sum_stay_positive():
    base = base_of()
    many = [tuned_from(base, seed) for seed in (1, 2, 3)]
    found = applied(base, compose(base, [delta_of(base, each) for each in many]))
    variances = torch.stack([each.stem[1].running_var for each in many])
    assert ((variances - 0.5).sum(dim=0) + 0.5 < 0).any(), "the plain sum would be negative"
    assert (found.stem[1].running_var >= variances.amin(dim=0)).all()
    assert torch.isfinite(found(torch.zeros(2, 1, 8, 8))).all()


def test_order_makes_no_difference_one_is_itself_and_none_is_nothing():
    base = base_of()
    deltas = [delta_of(base, tuned_from(base, seed, entries=100)) for seed in (1, 2, 3)]
    assert compose(base, deltas).sha256 == compose(base, deltas[::-1]).sha256
    assert compose(base, deltas[:1]).sha256 == deltas[0].sha256
    assert applied(base, compose(base, [])).state_dict().keys() == base.state_dict().keys()
    assert compose(base, []).count == 0


def test_bases_stay_as_they_are():
    base = base_of()
    tuned = tuned_from(base, 1)
    digests = weights_sha256(base), weights_sha256(tuned)
    compose(base, [delta_of(base, tuned, keep=5)])
    assert (weights_sha256(base), weights_sha256(tuned)) == digests


# ---------------------------------------------------------------- refusals


def test_another_base_is_refused_and_left_alone():
    base, other = base_of(), base_of(1)
    delta = delta_of(base, tuned_from(base, 1))
    digest = weights_sha256(other)
    for refused in (lambda: apply_delta(other, delta), lambda: compose(other, [delta])):
        with pytest.raises(CheckpointError, match=r"has a base with SHA-256 .* Give the network it was made from"):
            refused()
    assert weights_sha256(other) == digest
    model = copy.deepcopy(base)
    apply_delta(model, delta)
    with pytest.raises(CheckpointError, match="not one after another"):
        apply_delta(model, delta)


def test_another_structure_is_refused():
    base = base_of()
    wider = SPEC.model.model_copy(update={"widths": (8,)}).build(SPEC.num_classes, SPEC.input_shape)
    deeper = SPEC.model.model_copy(update={"depths": (2,)}).build(SPEC.num_classes, SPEC.input_shape)
    for other in (wider, deeper, nn.Linear(2, 2), copy.deepcopy(base).double()):
        with pytest.raises(CheckpointError, match="another structure than its base"):
            delta_of(base, other)


def test_values_that_are_no_numbers_and_negative_counts_are_refused():
    base = base_of()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.stem[0].weight.view(-1)[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"Tuned network has values that are not finite in 'stem.0.weight'"):
        delta_of(base, tuned)
    with pytest.raises(ValueError, match="keep has -1"):
        delta_of(base, base, keep=-1)


@pytest.mark.parametrize(
    "changes",
    [
        {"indices": {"stem.0.weight": torch.tensor([10_000])}},
        {"indices": {"stem.0.weight": torch.tensor([-1])}},
        {"indices": {"stem.0.weight": torch.tensor([1, 2])}},
        {"indices": {"nowhere": torch.tensor([1])}},
        {"indices": {}},
        {"values": {"stem.0.weight": torch.ones(1, dtype=torch.float64)}},
        {"whole": {"head.bias": torch.zeros(5)}},
        {"whole": {"nowhere": torch.zeros(5)}},
        {"whole": {"stem.0.weight": torch.zeros(4, 1, 3, 3)}},
    ],
    ids=["beyond", "negative", "count", "name", "values-alone", "type", "shape", "whole-name", "twice"],
)
def test_made_up_entries_are_refused(changes):
    base = base_of()
    fields = {
        "base_sha256": weights_sha256(base),
        "indices": {"stem.0.weight": torch.tensor([1])},
        "values": {"stem.0.weight": torch.ones(1)},
    }
    apply_delta(copy.deepcopy(base), Delta(**fields))
    with pytest.raises(CheckpointError, match="that do not fit the network given"):
        apply_delta(base, Delta(**(fields | changes)))
    assert weights_sha256(base) == fields["base_sha256"]


# ---------------------------------------------------------------- files


def test_a_file_holds_it_all_and_equal_deltas_give_equal_bytes(tmp_path):
    base = base_of()
    delta = delta_of(base, tuned_from(base, 1), keep=9)
    size = save_delta(delta, tmp_path / "new" / "site.safetensors")
    found = load_delta(tmp_path / "new" / "site.safetensors")
    assert found.sha256 == delta.sha256
    assert (found.base_sha256, found.count) == (weights_sha256(base), 9)
    assert all(each.dtype == torch.int64 for each in found.indices.values())
    assert_same(applied(base, found).state_dict(), applied(base, delta).state_dict())
    again = tmp_path / "again.safetensors"
    assert save_delta(found, again) == size == again.stat().st_size
    assert again.read_bytes() == (tmp_path / "new" / "site.safetensors").read_bytes()
    assert [each.name for each in (tmp_path / "new").iterdir()] == ["site.safetensors"], "no draft is left"
    assert load_file(again)["indices/blocks.0.0.weight"].dtype == torch.int32


def test_any_flipped_bit_and_any_cut_is_refused(tmp_path):
    base = base_of()
    path = tmp_path / "site.safetensors"
    save_delta(delta_of(base, tuned_from(base, 1, entries=3)), path)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|expected one of format"):
            load_delta(path)
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            load_delta(path)


def test_what_is_no_delta_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no file there"):
        load_delta(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="has the header {}, expected one of format 1"):
        load_delta(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"has suffix '.pt', expected .safetensors"):
        save_delta(Delta(""), tmp_path / "delta.pt")
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match="has not been written"):
        save_delta(Delta(""), tmp_path / "file" / "delta.safetensors")


# ---------------------------------------------------------------- commands


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path, Path]:
    """A base and two networks tuned from it, saved."""
    base = base_of()
    places = tmp_path / "base", tmp_path / "a", tmp_path / "b"
    for place, model in zip(places, (base, tuned_from(base, 1), tuned_from(base, 2, entries=200)), strict=True):
        save_checkpoint(model, SPEC, place)
    return places


def ran(*arguments: object):
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_make_then_apply_gives_the_tuned_checkpoint_back(folders, tmp_path):
    base, tuned, _ = folders
    made = ran("make", base, tuned, tmp_path / "a.safetensors")
    size = (tmp_path / "a.safetensors").stat().st_size
    assert made.exit_code == 0, made.output
    assert made.stdout.strip().endswith(f"30 of 252 entries (11.90%), 9 whole tensors, {size:,} bytes.")
    done = ran("apply", base, tmp_path / "a.safetensors", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip().endswith(f"1 delta of {size:,} bytes, 30 of 252 entries (11.90%).")
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == (tuned / "weights.safetensors").read_bytes()
    assert load_checkpoint(tmp_path / "out")[1] == SPEC


def test_several_are_added_up_and_few_entries_can_be_kept(folders, tmp_path):
    base, first, second = folders
    a, b, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out"
    assert "5 of 252 entries" in ran("make", base, first, a, "--keep", 5).stdout
    ran("make", base, second, b)
    start = load_checkpoint(base)[0]
    expected = compose(start, [load_delta(a), load_delta(b)])
    done = ran("apply", base, a, b, out)
    assert f"2 deltas of {a.stat().st_size + b.stat().st_size:,} bytes, {expected.count} of 252" in done.stdout
    assert f"{205 - expected.count} changes on top of others" in done.stdout
    assert_same(load_checkpoint(out)[0].state_dict(), applied(start, expected).state_dict())


def test_wrong_files_get_a_clear_error_and_nothing_is_written(folders, tmp_path):
    base, first, second = folders
    a, out = tmp_path / "a.safetensors", tmp_path / "out"
    ran("make", base, first, a)
    save_checkpoint(base_of(), SPEC.model_copy(update={"class_names": ("w", "x", "y", "z")}), tmp_path / "renamed")
    cases = [
        (("make", base, first, a), "exists already"),
        (("make", base, first, tmp_path / "a.bin"), "has suffix '.bin'"),
        (("make", base, tmp_path / "renamed", out), "has suffix ''"),
        (("make", base, tmp_path / "renamed", tmp_path / "r.safetensors"), "has another class_names than"),
        (("make", tmp_path / "none", first, tmp_path / "r.safetensors"), "has no spec.json"),
        (("apply", second, a, out), r"a.safetensors' has a base with SHA-256 .* the weights of '.*/b'"),
        (("apply", base, a, a, out), "has been given before"),
        (("apply", base, first / "weights.safetensors", out), "has the header {}"),
        (("apply", base, a, first), "exists already"),
    ]
    for arguments, said in cases:
        found = ran(*arguments)
        with pytest.raises(InputError, match=said):
            raise found.exception
    assert not out.exists()
    assert not (tmp_path / "r.safetensors").exists()
    assert ran("apply", base, out).exit_code == 2
    assert ran("make", base, first, tmp_path / "r.safetensors", "--keep", -1).exit_code == 2


@pytest.mark.parametrize("command", ["make", "apply"])
def test_help_has_an_example(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert f"Example: stillhouse delta {command} checkpoints/base" in ran(command, "--help").stdout
