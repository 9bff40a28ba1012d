"""Masks are what they promise, and every sparsifier leaves exact zeros in a student that is otherwise as before."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from torch.nn.utils import parametrize

from compression.catalogue import members
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.data.dataset import Dataset
from compression.errors import CompressionError, ShapeError
from compression.sparsify import AnySparsifier, LearnedNm, MagnitudeNm, Rigl, Sparsifier, Supermask
from compression.sparsify.nm import (
    apply_masks,
    candidates,
    follows,
    grouped,
    largest,
    layers_of,
    magnitude_mask,
    masks_of_zeros,
    share_of_zeros,
    ungrouped,
)
from compression.teacher_outputs import StoredOutputs
from export.onnx_graph import to_onnx
from export.runtime import OnnxSession, predict_fn
from tests.compression.losses.short_training import Stop, stored
from tests.compression.sparse_training import SPARSE, TRAIN, made_sparse, session, student
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS: dict[str, Sparsifier] = {
    "magnitude_nm": MagnitudeNm(train=TRAIN),
    "learned_nm": LearnedNm(train=TRAIN),
    "rigl": Rigl(train=TRAIN, every_steps=2),
    "supermask": Supermask(train=TRAIN, keep=0.25),
}
ZEROS = {"magnitude_nm": 0.5, "learned_nm": 0.5, "rigl": 0.75, "supermask": 0.75}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.fixture(scope="module")
def panel(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[StoredOutputs]:
    return [stored(dataset, tmp_path_factory.mktemp("outputs"), width=5, seed=1)]


# --- masks --------------------------------------------------------------------------------------------


def test_groups_run_along_the_inputs_for_each_output_and_place_in_the_window():
    weight = torch.arange(2 * 8 * 3 * 3.0).reshape(2, 8, 3, 3)
    groups = grouped(weight, 4)
    assert groups.shape == (2 * 3 * 3 * 2, 4)
    assert torch.equal(groups[0], weight[0, :4, 0, 0])
    assert torch.equal(groups[1], weight[0, 4:, 0, 0])
    assert torch.equal(groups[2], weight[0, :4, 0, 1])


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (2, 8, 3, 2)], ids=str)
def test_ungrouping_is_the_inverse(shape):
    weight = torch.randn(shape)
    assert torch.equal(ungrouped(grouped(weight, 4), weight.shape), weight)


@given(seed=st.integers(0, 2**31 - 1), nm=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 8), (7, 8)]))
def test_magnitude_keeps_exactly_n_and_none_smaller_than_those_that_go(seed, nm):
    n, m = nm
    weight = torch.randn(3, 16, 2, 2, generator=torch.Generator().manual_seed(seed))
    kept = grouped(magnitude_mask(weight, n, m), m)
    sizes = grouped(weight, m).abs()
    assert (kept.sum(dim=1) == n).all()
    smallest_kept = sizes.masked_fill(~kept, float("inf")).amin(dim=1)
    assert (smallest_kept >= sizes.masked_fill(kept, 0.0).amax(dim=1)).all()
    assert follows(weight * magnitude_mask(weight, n, m), n, m)
    assert not follows(weight, n, m)


def test_ties_go_to_the_first():
    assert magnitude_mask(torch.ones(1, 8), 2, 4).tolist() == [[True, True, False, False] * 2]
    assert largest(torch.ones(5), 2).tolist() == [True, True, False, False, False]


def test_memory_format_does_not_matter():
    weight = torch.randn(4, 8, 3, 3)
    turned = weight.contiguous(memory_format=torch.channels_last)
    assert torch.equal(magnitude_mask(weight, 2, 4), magnitude_mask(turned, 2, 4))
    assert torch.equal(largest(weight, 20), largest(turned, 20))


def test_candidates_are_all_masks_of_a_group_once():
    found = candidates(2, 4)
    assert found.shape == (6, 4)
    assert (found.sum(dim=1) == 2).all()
    assert len(found.unique(dim=0)) == 6


def test_groups_that_do_not_come_out_even_are_refused():
    with pytest.raises(ShapeError, match=r"\[2, 6\], expected a multiple of 4"):
        magnitude_mask(torch.ones(2, 6), 2, 4)
    assert not follows(torch.zeros(2, 6), 2, 4)


def test_layers_with_few_uneven_or_skipped_inputs_stay_dense(dataset):
    model, _ = student(dataset)
    assert tuple(layers_of(model)) == SPARSE
    assert tuple(layers_of(model, multiple_of=8)) == SPARSE[:2]
    assert tuple(layers_of(model, skip=("blocks.0", "head"))) == (SPARSE[1],)
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    assert tuple(layers_of(depthwise)) == ("1.weight",)
    assert tuple(layers_of(nn.Linear(4, 2))) == ("weight",)


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_done_is_refused_before_training(kind, dataset):
    def never(done: int, total: int) -> None:
        raise AssertionError

    skips = KINDS[kind].model_copy(update={"skip": ("nowhere",)})
    with pytest.raises(CompressionError, match=r"skip has 'nowhere'.*blocks\.0\.0"):
        made_sparse(skips, dataset, on_step=never)
    everything = KINDS[kind].model_copy(update={"skip": ("blocks", "head")})
    with pytest.raises(CompressionError, match="0 layers to make sparse"):
        made_sparse(everything, dataset, on_step=never)


@pytest.mark.parametrize("kind", [MagnitudeNm, LearnedNm])
def test_patterns_without_zeros_are_refused(kind):
    with pytest.raises(ValidationError, match="n has 4, expected less than m = 4"):
        kind(n=4, m=4)


@pytest.mark.parametrize("kind", [LearnedNm, Supermask])
def test_one_epoch_cannot_hold_both_parts(kind):
    with pytest.raises(ValidationError, match="expected at least 2"):
        kind(train=TRAIN.model_copy(update={"epochs": 1}))
    masks, weights = kind(train=TRAIN.model_copy(update={"epochs": 1}), mask_share=1.0).schedules()
    assert masks.epochs == 1
    assert weights is None


def test_only_patterns_of_zeros_count_as_sparse():
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(16, 4), nn.LayerNorm(16))
    with torch.no_grad():
        model[0].weight[:, 0] = 0  # one in sixteen: chance
        model[1].weight[:, :2] = 0  # one in eight
        model[2].weight.zero_()  # untrained
        model[3].weight.zero_()
    found = masks_of_zeros(model)
    assert list(found) == ["1.weight"]
    assert torch.equal(found["1.weight"], model[1].weight != 0)
    assert share_of_zeros(model) == pytest.approx((4 + 8 + 64) / 192)


def test_masking_keeps_the_bits_of_what_stays():
    model = nn.Linear(8, 4)
    before, mask = model.weight.detach().clone(), magnitude_mask(model.weight, 2, 4)
    apply_masks(model, {"weight": mask})
    assert torch.equal(model.weight, torch.where(mask, before, 0.0))
    assert not model.weight[~mask].signbit().any()


# --- every sparsifier ---------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_parameter(name) for name in SPARSE}


@pytest.fixture(scope="module", params=KINDS)
def result(request, dataset, panel) -> tuple[str, nn.Module, list]:
    torch.set_num_threads(1)
    model, history = made_sparse(KINDS[request.param], dataset, panel)
    return request.param, model, history.rows


def test_the_zeros_are_exact_and_as_many_as_promised(result):
    kind, model, rows = result
    for name, weight in weights_of(model).items():
        share = (weight == 0).double().mean().item()
        # Whole weights, rounded down to keep; a weight that just came in is zero too.
        assert ZEROS[kind] <= share <= ZEROS[kind] + 2 / weight.numel(), name
        if kind in ("magnitude_nm", "learned_nm"):
            assert ((grouped(weight, 4) != 0).sum(dim=1) == 2).all()
    assert (model.get_parameter("stem.0.weight") != 0).all()
    assert [row["epoch"] for row in rows] == [0, 1]
    assert "kd" in rows[-1]


def test_the_structure_is_the_specs_and_the_checkpoint_holds_it(result, dataset, tmp_path):
    _, model, _ = result
    _, spec = student(dataset)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    save_checkpoint(model, spec, tmp_path)
    again, _ = load_checkpoint(tmp_path)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    images = torch.randn(5, *dataset.input_shape)
    plain = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    assert torch.equal(again(images), plain(images))


def test_equal_seeds_give_equal_bits_and_others_do_not(result, dataset, panel):
    kind, model, _ = result
    same, _ = made_sparse(KINDS[kind], dataset, panel)
    assert all(torch.equal(left, right) for left, right in zip(same.parameters(), model.parameters(), strict=True))
    other, _ = made_sparse(KINDS[kind], dataset, panel, seed=1)
    assert any(not torch.equal(left, right) for left, right in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("step", [3, 7])
def test_a_killed_training_goes_on_bit_for_bit(result, dataset, panel, tmp_path: Path, step: int):
    """Two epochs of four steps: of the kinds that learn masks first, one kill hits each part."""
    kind, model, rows = result
    learns_masks = kind in ("learned_nm", "supermask")
    counted = iter(range(1, 100))

    def stop(done: int, total: int) -> None:
        del done, total
        if next(counted) == step:
            raise Stop

    with pytest.raises(Stop):
        made_sparse(KINDS[kind], dataset, panel, folder=tmp_path, on_step=stop)
    assert sorted(each.name for each in tmp_path.iterdir()) == (
        ["weights"] if not learns_masks else ["masks"] if step == 3 else ["masks", "weights"]
    )
    again, history = made_sparse(KINDS[kind], dataset, panel, folder=tmp_path)
    for name, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert history.rows[-1]["loss"] == rows[-1]["loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_panel_labels_teach(kind, dataset):
    model, history = made_sparse(KINDS[kind], dataset)
    assert "cross_entropy" in history.rows[-1]
    assert "kd" not in history.rows[-1]
    assert share_of_zeros(model) > 0.4


def test_the_random_state_of_the_process_is_left_alone(dataset):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for config in (KINDS["learned_nm"], Rigl(train=TRAIN, start="fresh"), Supermask(train=TRAIN)):
        made_sparse(config, dataset)
        assert torch.equal(torch.get_rng_state(), before)


def test_every_kind_is_in_the_union_with_a_card():
    assert {kind.model_fields["kind"].default for kind in members(AnySparsifier)} == set(KINDS)
    for config in members(AnySparsifier):
        assert config.card.evidence.endswith("Not measured on our data yet.")


# --- magnitude ----------------------------------------------------------------------------------------


def test_momentum_never_revives_a_weight(dataset, panel):
    model, spec = student(dataset)
    masks = {name: magnitude_mask(weight, 2, 4) for name, weight in weights_of(model).items()}
    seen: list[int] = []

    def look(done: int, total: int) -> None:
        seen.append(done)
        for name, weight in weights_of(model).items():
            assert not weight[~masks[name]].any(), name

    MagnitudeNm(train=TRAIN).run(replace(session(model, spec, dataset), on_step=look))
    assert seen == list(range(1, 9))
    # What stays was trained.
    start, _ = student(dataset)
    for name, weight in weights_of(model).items():
        assert (weight != start.get_parameter(name))[masks[name]].any()


def test_skipped_layers_are_trained_dense(dataset):
    model, _ = made_sparse(MagnitudeNm(train=TRAIN, skip=("head",)), dataset)
    assert (model.get_parameter("head.weight") != 0).all()
    assert follows(model.get_parameter("blocks.0.0.weight"), 2, 4)


def test_a_probe_of_latency_agrees(dataset, tmp_path):
    model, _ = student(dataset)
    apply_masks(model, {name: magnitude_mask(weight, 2, 4) for name, weight in weights_of(model).items()})
    path = tmp_path / "sparse.onnx"
    to_onnx(model, path, input_shape=dataset.input_shape, metadata={}, fast=True)
    images = torch.randn(6, *dataset.input_shape)
    with torch.no_grad():
        torch.testing.assert_close(predict_fn(OnnxSession(path))(images), model(images), atol=1e-4, rtol=0)
