"""Token pruning: which tokens stay and how many, what stays as it was, and that every form of the network agrees."""

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from compression import profile
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.edits import SkipModule
from compression.errors import CompressionError, ShapeError
from compression.models import AnyModel, ModelSpec, build_model
from compression.quantize.prepared import convert, prepare_qat
from compression.search.space import Workshop
from compression.search.tokens import Tokens, middle_points, tokens_after
from compression.zoo import PlainCnn, VisionTransformer
from compression.zoo.vision_transformer import Attention, TransformerBlock, kept_tokens, token_scores
from export.onnx_graph import to_onnx
from tests.compression.test_study import PREPROCESSING, Trainer, config_of, dataset_of, search

DENSE = VisionTransformer(width=16, depth=4, num_heads=2, patch_size=2, stem="patch")  # 36 tokens of a 12x12 image
PRUNED = DENSE.model_copy(update={"keep_tokens": (36, 20, 20, 9)})


def parent_of(config: AnyModel = DENSE, *edits: SkipModule, seed: int = 0) -> tuple[Any, ModelSpec]:
    spec = ModelSpec(
        model=config,
        num_classes=3,
        input_shape=(1, 12, 12),
        class_names=("a", "b", "c"),
        preprocessing=PREPROCESSING,
        edits=edits,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(spec).eval(), spec


def shop_of(folder: Path, parent: tuple[nn.Module, ModelSpec]) -> Workshop:
    return Workshop({"teacher": parent}, dataset_of(), seed=0, folder=folder)


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(1))


def counts_in(model: nn.Module) -> list[int]:
    """How many tokens leave each block."""
    seen: list[int] = []
    blocks: Any = model.get_submodule("blocks")
    hooks = [block.register_forward_hook(lambda _m, _i, output: seen.append(output.shape[1])) for block in blocks]
    with torch.no_grad():
        model(images())
    for hook in hooks:
        hook.remove()
    return seen


# --- the score


def test_the_score_is_what_a_token_receives_weighted_by_its_heads():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 3, 5, 5, generator=generator).softmax(-1)
    mixed = torch.randn(2, 3, 5, 4, generator=generator)
    found = token_scores(weights, mixed)
    assert found.shape == (2, 5)
    for image in range(2):
        for token in range(5):
            norms = [mixed[image, head, token].square().sum().sqrt().item() for head in range(3)]
            received = [sum(weights[image, head, query, token].item() for query in range(5)) / 5 for head in range(3)]
            expected = sum(a * n / sum(norms) for a, n in zip(received, norms, strict=True))
            assert found[image, token].item() == pytest.approx(expected, rel=1e-5)


def test_equal_head_norms_leave_the_mean_attention():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 4, 6, 6, generator=generator).softmax(-1)
    mixed = F.normalize(torch.randn(2, 4, 6, 3, generator=generator), dim=-1)
    torch.testing.assert_close(token_scores(weights, mixed), weights.mean(dim=(1, 2)))


def test_a_head_that_says_nothing_about_a_token_does_not_count():
    weights = torch.tensor([[[[0.9, 0.1], [0.9, 0.1]], [[0.2, 0.8], [0.2, 0.8]]]])
    mixed = torch.ones(1, 2, 2, 3)
    mixed[:, 0] = 0.0
    torch.testing.assert_close(token_scores(weights, mixed), torch.tensor([[0.2, 0.8]]))
    assert token_scores(weights, torch.zeros(1, 2, 2, 3)).tolist() == [[0.0, 0.0]]


def test_kept_are_the_highest_in_the_order_they_had():
    x = torch.arange(12.0).reshape(2, 3, 2)
    scores = torch.tensor([[0.1, 0.3, 0.2], [0.9, 0.1, 0.5]])
    assert torch.equal(kept_tokens(x, scores, 2), torch.stack([x[0, [1, 2]], x[1, [0, 2]]]))
    assert torch.equal(kept_tokens(x, scores, 3), x)


# --- the network


def test_attention_with_scores_gives_the_same_output():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention, x = Attention(16, 4), torch.randn(2, 7, 16)
    output, scores = attention.scored(x)
    torch.testing.assert_close(output, attention(x))
    attention.fused_attn = False
    assert torch.equal(output, attention(x))
    assert scores.shape == (2, 7)
    assert (scores > 0).all()


def test_dropping_before_the_mlp_is_dropping_after_the_block():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block, x = TransformerBlock(16, 4, 32, keep_tokens=3), torch.randn(2, 7, 16)
    _, scores = block.attn.scored(block.norm1(x))
    found = block(x)
    block.keep_tokens = 0
    torch.testing.assert_close(found, kept_tokens(block(x), scores, 3))


def test_keeping_all_is_the_dense_network_bit_for_bit():
    dense, _ = parent_of()
    all_kept, _ = parent_of(DENSE.model_copy(update={"keep_tokens": (36,) * 4}))
    state = dense.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in all_kept.state_dict().items())
    with torch.no_grad():
        assert torch.equal(dense(images()), all_kept(images()))


def test_the_dense_network_computes_what_it_always_did():
    """The network written out, without any of the code that can drop tokens."""
    model, _ = parent_of()
    with torch.no_grad():
        x = model.tokens(images()) + model.positions
        for block in model.blocks:
            qkv = block.attn.qkv(block.norm1(x)).reshape(5, 36, 3, 2, 8)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            mixed = F.scaled_dot_product_attention(query, key, value)
            x = x + block.attn.proj(mixed.transpose(1, 2).reshape(5, 36, 16))
            x = x + block.mlp(block.norm2(x))
        assert torch.equal(model(images()), model.head(model.norm(x).mean(1)))


def test_token_counts_after_each_block_are_exact():
    assert counts_in(parent_of()[0]) == [36, 36, 36, 36]
    assert counts_in(parent_of(PRUNED)[0]) == [36, 20, 20, 9]


@pytest.mark.parametrize("fused", [True, False])
def test_blocks_that_drop_nothing_may_fuse_attention(fused):
    model, _ = parent_of(PRUNED)
    with torch.no_grad():
        expected = model(images())
        for block in model.blocks:
            block.attn.fused_attn = fused
        torch.testing.assert_close(model(images()), expected)


def test_a_network_that_drops_tokens_trains_and_treats_each_image_alone():
    model, _ = parent_of(PRUNED)
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 0, 1])).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    order = torch.tensor([3, 1, 4, 0, 2])
    with torch.no_grad():
        torch.testing.assert_close(model(images()[order]), model(images())[order])


def test_fewer_tokens_are_fewer_macs():
    assert profile.macs(parent_of(PRUNED)[0], (1, 12, 12)) < 0.8 * profile.macs(parent_of()[0], (1, 12, 12))
    assert profile.params(parent_of(PRUNED)[0]) == profile.params(parent_of()[0])


@pytest.mark.parametrize(
    ("counts", "said"),
    [((20, 20), "2 numbers, expected 4"), ((20, 20, 21, 9), "no number above"), ((20, 20, 9, 0), "greater than 0")],
    ids=["length", "ascending", "none-left"],
)
def test_counts_that_make_no_sense_are_refused(counts, said):
    with pytest.raises(ValidationError, match=said):
        VisionTransformer.model_validate(DENSE.model_dump() | {"keep_tokens": counts})


def test_more_tokens_than_the_image_has_are_refused():
    with pytest.raises(ShapeError, match="keep_tokens 37 for an image of 36 tokens"):
        parent_of(DENSE.model_copy(update={"keep_tokens": (37, 20, 20, 9)}))


# --- other forms of it


@pytest.mark.parametrize("fast", [True, False], ids=["traced", "exported"])
def test_exports_with_fixed_counts_and_a_dynamic_batch(tmp_path, fast):
    model, spec = Tokens(parent="teacher", points=((0, 2),)).build(
        {"keep": 0.5, "points": "0-2"}, shop_of(tmp_path, parent_of())
    )
    info = to_onnx(model, tmp_path / "model.onnx", input_shape=spec.input_shape, metadata={}, fast=fast)
    assert info.opset == 20
    assert info.nodes["GatherElements"] == 2
    assert info.nodes["TopK"] >= 2
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 5):
        (found,) = session.run(None, {"images": images(count).numpy()})
        with torch.no_grad():
            assert (torch.from_numpy(found) - model(images(count))).abs().max() < 1e-4


def test_learns_to_be_int8():
    model, spec = parent_of(PRUNED)
    prepared = prepare_qat(model, spec.input_shape, images())
    prepared.train()(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    quantized = convert(prepared)
    with torch.no_grad():
        difference = (quantized(images(3)) - model(images(3))).abs().max()
        assert 0 < difference < 0.2 * model(images(3)).abs().max() + 0.05


# --- the space


@pytest.mark.parametrize(
    ("depth", "points"), [(2, (0,)), (3, (1,)), (4, (1,)), (5, (1, 2)), (6, (2, 3)), (9, (3, 5)), (12, (4, 7))]
)
def test_the_usual_points_bound_the_middle_third(depth, points):
    assert middle_points(depth) == points
    assert points[-1] < depth - 1


@pytest.mark.parametrize(
    ("points", "keep", "expected"),
    [
        ((1,), 0.5, (36, 18, 18, 18)),
        ((0, 2), 0.5, (18, 18, 9, 9)),
        ((0, 1, 2), 0.7, (25, 18, 13, 13)),
        ((0, 2), 0.01, (1, 1, 1, 1)),
        ((0, 2), 1.0, ()),
    ],
)
def test_counts_are_shares_of_what_is_left(points, keep, expected):
    assert tokens_after(DENSE, 36, points, keep) == expected


def test_counts_of_the_parent_are_an_upper_bound():
    assert tokens_after(PRUNED, 36, (0, 2), 0.5) == (18, 18, 9, 9)
    assert tokens_after(PRUNED, 36, (2,), 0.6) == (36, 20, 12, 9)
    assert tokens_after(PRUNED, 36, (2,), 1.0) == PRUNED.keep_tokens


def test_candidates_are_the_same_again_keep_all_weights_and_leave_the_parent_alone(tmp_path):
    model, spec = parent_of()
    model.train()
    before = copy.deepcopy(model.state_dict())
    space = Tokens(parent="teacher", points=((0, 2),))
    random_state = torch.get_rng_state()
    choices = {"keep": 0.5, "points": "0-2"}
    first: Any
    first, first_spec = space.build(choices, shop_of(tmp_path, (model, spec)))
    second, second_spec = space.build(choices, shop_of(tmp_path, (model, spec)))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first_spec == second_spec
    assert first_spec == spec.model_copy(update={"model": DENSE.model_copy(update={"keep_tokens": (18, 18, 9, 9)})}), (
        "the spec says it all"
    )
    assert counts_in(first) == [18, 18, 9, 9]
    assert not first.training
    assert model.training
    assert all(parameter.requires_grad for parameter in first.parameters())
    assert first.state_dict().keys() == before.keys()
    for name, value in first.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(value, second.state_dict()[name])
    save_checkpoint(first, first_spec, tmp_path / "checkpoint")
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    with torch.no_grad():
        assert torch.equal(loaded(images()), first(images()))
        assert not torch.allclose(first(images()), model.eval()(images()))
        first.head.bias.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "weights are copies"


def test_a_share_of_one_is_the_parent(tmp_path):
    model, spec = parent_of()
    candidate, found = Tokens(parent="teacher", keeps=(1.0,)).build(
        {"keep": 1.0, "points": "1"}, shop_of(tmp_path, (model, spec))
    )
    assert found == spec
    with torch.no_grad():
        assert torch.equal(candidate(images()), model(images()))


def test_a_parent_that_lost_a_block_can_lose_tokens(tmp_path):
    parent = parent_of(DENSE, SkipModule(module="blocks.1"))
    space = Tokens(parent="teacher", points=((2,),))
    model, spec = space.build({"keep": 0.5, "points": "2"}, shop_of(tmp_path, parent))
    assert counts_in(model) == [36, 36, 18, 18]
    save_checkpoint(model, spec, tmp_path / "checkpoint")
    with pytest.raises(CompressionError, match="point 1, a block that was left out"):
        Tokens(parent="teacher").genes(shop_of(tmp_path, parent))


def test_genes_are_shares_and_words(tmp_path):
    shop = shop_of(tmp_path, parent_of())
    assert Tokens(parent="teacher", keeps=(0.7, 0.5, 0.7)).genes(shop) == {"keep": (0.5, 0.7), "points": ("1",)}
    space = Tokens(parent="teacher", points=((2, 0), (1,), (0, 2)))
    assert space.genes(shop)["points"] == ("0-2", "1")
    assert space.label == "tokens-teacher"
    assert Tokens.model_validate_json(space.model_dump_json()) == space


def test_a_whole_study(tmp_path):
    space = Tokens(parent="teacher", keeps=(0.5, 1.0), points=((0,), (1,)))
    config = config_of(trials=4, spaces=(space,))
    result = search(tmp_path, config, train=Trainer(), parents={"teacher": parent_of()}, best_teacher="teacher")
    states = {(trial.choices["keep"], trial.choices["points"]): trial.state for trial in result.trials}
    assert states[0.5, "0"] == states[0.5, "1"] == "complete"
    assert sorted([states[1.0, "0"], states[1.0, "1"]]) == ["complete", "duplicate"], "both are the parent"
    macs = {(trial.choices["keep"], trial.choices["points"]): trial.macs or 0 for trial in result.trials}
    assert 0 < macs[0.5, "0"] < macs[0.5, "1"] < macs[1.0, "0"]
    for folder in result.finalists:
        load_checkpoint(folder)


# --- refusals


def test_impossible_settings_are_refused_before_any_work(tmp_path):
    shop = shop_of(tmp_path, parent_of())
    with pytest.raises(CompressionError, match="parent 'nobody', expected one of teacher"):
        Tokens(parent="nobody").genes(shop)
    with pytest.raises(CompressionError, match=r"point 3, expected blocks from 0 to 2 .*saves no time"):
        Tokens(parent="teacher", points=((1, 3),)).genes(shop)
    with pytest.raises(CompressionError, match="points 'first', expected numbers of blocks"):
        Tokens(parent="teacher").build({"keep": 0.5, "points": "first"}, shop)
    plain = shop_of(tmp_path, parent_of(PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8)))
    with pytest.raises(CompressionError, match="Parent 'teacher' has a model of kind 'plain_cnn'"):
        Tokens(parent="teacher").genes(plain)
    flat = shop_of(tmp_path, parent_of(DENSE.model_copy(update={"depth": 1})))
    with pytest.raises(CompressionError, match="Parent 'teacher' has 1 block, expected two"):
        Tokens(parent="teacher").genes(flat)


@pytest.mark.parametrize("changes", [{"keeps": (0.0,)}, {"keeps": (1.1,)}, {"keeps": ()}, {"points": ((),)}])
def test_fields_out_of_range_are_refused(changes):
    with pytest.raises(ValidationError, match=r"keeps|points"):
        Tokens(parent="teacher", **changes)
