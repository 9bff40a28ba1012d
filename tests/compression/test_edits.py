"""Skipped modules: left out, found again by comparing, stored, and mixed with other edits; nothing else gets in."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.edits import AnyEdit, ResizeModule, SetAttributes, SkipModule, apply_edits, diff_edits
from compression.errors import CheckpointError, ShapeError
from compression.models import ModelSpec, build_model
from compression.search.prune import prune_model
from compression.types import Preprocessing
from compression.zoo import ResidualCnn

CONFIG = ResidualCnn(widths=(8, 16), depths=(2, 2), strides=(1, 2), stem_width=8)
SKIP = SkipModule(module="blocks.1")


def spec_for(*edits: AnyEdit) -> ModelSpec:
    return ModelSpec(
        model=CONFIG,
        num_classes=3,
        input_shape=(1, 8, 8),
        class_names=("a", "b", "c"),
        preprocessing=Preprocessing(scale=255.0, mean=(0.5,), std=(0.25,)),
        edits=edits,
    )


def built(*edits: AnyEdit) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(spec_for(*edits)).eval()


def images() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def test_an_identity_takes_the_place_and_the_rest_computes_what_it_did():
    model = built()
    block = model.blocks[1]
    inputs: list[torch.Tensor] = []
    block.register_forward_pre_hook(lambda _module, given: inputs.append(given[0]))
    model(images())
    expected = model.head(model.blocks[3](model.blocks[2](inputs[0])).mean((2, 3)))
    apply_edits(model, [SKIP])
    assert type(model.blocks[1]) is nn.Identity
    assert not model.blocks[1].training, "the mode of what was there"
    assert not any(key.startswith("blocks.1.") for key in model.state_dict())
    assert torch.equal(model(images()), expected)


def test_comparing_finds_the_skip_and_nothing_below_it():
    model = built()
    apply_edits(model, [SKIP])
    assert diff_edits(built(), model) == (SKIP,)
    assert diff_edits(built(SKIP), model) == ()


def test_what_was_skipped_before_is_no_new_edit():
    once = built(SKIP)
    twice = built(SKIP, SkipModule(module="blocks.3"))
    assert diff_edits(once, twice) == (SkipModule(module="blocks.3"),)
    assert diff_edits(built(), twice) == (SKIP, SkipModule(module="blocks.3"))


@pytest.mark.parametrize("skip_first", [True, False])
def test_channels_and_blocks_go_in_any_order(skip_first, tmp_path):
    """Replaying what the comparison found gives the same network, and so does the checkpoint."""
    model, spec = (built(SKIP), spec_for(SKIP)) if skip_first else (built(), spec_for())
    pruned, pruned_spec = prune_model(model, spec, ratio=0.5, round_to=2)
    if not skip_first:
        apply_edits(pruned, [SKIP])
        pruned_spec = pruned_spec.model_copy(update={"edits": (*pruned_spec.edits, SKIP)})
    found = diff_edits(built(), pruned)
    assert found[0] == SKIP
    assert any(isinstance(edit, ResizeModule) for edit in found)
    assert not any(edit.module.startswith("blocks.1.") for edit in found if isinstance(edit, ResizeModule))
    for edits in (found, pruned_spec.edits):
        again = built(*edits)
        again.load_state_dict(pruned.state_dict())
        assert torch.equal(again(images()), pruned.eval()(images()))
        assert names(again) == names(pruned)
    save_checkpoint(pruned, pruned_spec, tmp_path)
    loaded, loaded_spec = load_checkpoint(tmp_path)
    assert loaded_spec == pruned_spec
    assert torch.equal(loaded(images()), pruned(images()))


def test_a_block_two_places_share_is_still_there_when_one_goes():
    def network() -> nn.Sequential:
        shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        return nn.Sequential(shared, shared, nn.Linear(4, 2))

    pruned = network()
    apply_edits(pruned, [SkipModule(module="0"), ResizeModule(module="2", in_features=4, out_features=3)])
    found = diff_edits(network(), pruned)
    assert found == (SkipModule(module="0"), ResizeModule(module="2", in_features=4, out_features=3))


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([SkipModule(module="blocks.7")], "'blocks.7' has no target"),
        ([SkipModule(module="nowhere.at.all")], "'nowhere.at.all' has no target"),
        ([SKIP, ResizeModule(module="blocks.1.first.0", in_features=8, out_features=4)], "'blocks.1.first.0' has no"),
        ([SKIP, SkipModule(module="blocks.1.first")], "'blocks.1.first' has no target"),
        ([SKIP, SetAttributes(module="blocks.1.first.1", values={"eps": 0.1})], "'blocks.1.first.1' has no"),
    ],
    ids=["no-block", "no-module", "resize-below", "skip-below", "number-below"],
)
def test_what_does_not_exist_is_refused(edits, said):
    with pytest.raises(CheckpointError, match=said):
        built(*edits)


def test_the_network_itself_cannot_be_skipped():
    with pytest.raises(ValidationError, match="at least 1 character"):
        SkipModule(module="")
    with pytest.raises(ShapeError, match="Module '' has type Identity"):
        diff_edits(built(), nn.Identity())


class Doubling(nn.Identity):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * input


def _with_tensor() -> nn.Module:
    identity = nn.Identity()
    identity.register_buffer("hidden", torch.ones(1))
    return identity


def _with_child() -> nn.Module:
    identity = nn.Identity()
    identity.add_module("hidden", nn.Linear(2, 2))
    return identity


@pytest.mark.parametrize("make", [Doubling, _with_tensor, _with_child], ids=["subclass", "tensor", "child"])
def test_only_a_bare_identity_counts_as_skipped(make):
    model = built()
    model.blocks[1] = make()
    with pytest.raises(ShapeError, match="expected ResidualBlock"):
        diff_edits(built(), model)


def test_a_skip_that_was_taken_back_is_no_edit():
    with pytest.raises(ShapeError, match=r"expected (Identity|nothing)"):
        diff_edits(built(SKIP), built())


def test_survives_json():
    adapter = TypeAdapter(tuple[AnyEdit, ...])
    edits = (SKIP, ResizeModule(module="head", in_features=16, out_features=3))
    assert adapter.validate_json(adapter.dump_json(edits)) == edits
