"""Where models look: identities of Grad-CAM and occlusion, and what agreement means."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression.attention import (
    Agreement,
    AttentionConfig,
    attention_layer,
    class_gradients,
    compare_maps,
    grad_cam,
    occlusion_drops,
)
from compression.checkpoint import save_checkpoint
from compression.data.dataset import save_dataset
from compression.errors import CompressionError, ShapeError
from compression.models import ModelSpec
from compression.zoo import Mixer, ResidualCnn, VisionTransformer
from tests.compression.tiny_data import tiny_dataset

SHAPE = (1, 16, 16)
CNN = ResidualCnn(widths=(8, 12), depths=(1, 1), strides=(1, 2), stem_width=8)


def cnn(seed: int, width: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return CNN.model_copy(update={"widths": (8, width)}).build(4, SHAPE).eval()


def noise(count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_behind_a_mean_and_a_linear_layer_alpha_is_the_weight_over_the_places():
    model, images, classes = cnn(0), noise(6), torch.tensor([0, 1, 2, 3, 0, 1])
    maps, alpha = class_gradients(model, images, classes, attention_layer(model, images))
    assert maps.shape == (6, 12, 8, 8)
    torch.testing.assert_close(alpha, model.get_submodule("head").weight[classes].detach() / 64)


def test_the_map_is_the_weighted_sum_of_the_last_maps():
    model, images, classes = cnn(1), noise(3), torch.tensor([3, 0, 1])
    last = model.get_submodule("blocks")(model.get_submodule("stem")(images))
    weights = model.get_submodule("head").weight[classes]
    expected = F.interpolate(torch.einsum("nkhw,nk->nhw", last, weights).relu()[:, None], SHAPE[1:], mode="bilinear")[
        :, 0
    ]
    expected = expected / expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(grad_cam(model, images, classes), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_model_agrees_with_itself_and_not_with_a_random_one():
    images, classes = noise(24), torch.arange(24) % 4
    own = grad_cam(cnn(2), images, classes)
    itself = compare_maps(own, grad_cam(cnn(2), images, classes))
    assert (itself.pearson, itself.spearman, itself.iou) == pytest.approx((1.0, 1.0, 1.0))
    assert itself.num_images == 24
    random = [compare_maps(own, grad_cam(cnn(seed, width=20), images, classes)) for seed in range(10, 16)]
    assert abs(np.mean([each.pearson for each in random])) < 0.2
    assert abs(np.mean([each.spearman for each in random])) < 0.2
    assert np.mean([each.iou for each in random]) < 0.3


def state(model: nn.Module) -> tuple:
    hooks = sum(len(each._forward_hooks) for each in model.modules())
    modes = [each.training for each in model.modules()]
    flags = [(each.requires_grad, each.grad is None) for each in model.parameters()]
    return modes, flags, hooks, {name: value.clone() for name, value in model.state_dict().items()}


def test_the_model_is_left_as_it_was():
    model = cnn(0).train()
    model.get_submodule("head").eval().requires_grad_(False)
    before, generator = state(model), torch.get_rng_state()
    images = noise(4)
    kept = images.clone()
    with torch.inference_mode():
        inside = grad_cam(model, images, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(inside, grad_cam(model, images, torch.zeros(4, dtype=torch.int64)))
    after = state(model)
    assert after[:3] == before[:3]
    assert all(torch.equal(after[3][name], value) for name, value in before[3].items())
    assert torch.equal(images, kept)
    assert not images.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)


def test_tokens_become_a_grid():
    model = VisionTransformer(width=16, depth=2, patch_size=4, num_heads=2).build(4, SHAPE).eval()
    images, classes = noise(3), torch.tensor([0, 1, 2])
    maps, _ = class_gradients(model, images, classes, attention_layer(model, images))
    assert maps.shape == (3, 16, 4, 4)
    assert grad_cam(model, images, classes).shape == (3, 16, 16)
    mixer = Mixer(width=16, depth=1, patch_size=4).build(4, SHAPE).eval()
    assert grad_cam(mixer, images, classes).flatten(1).amax(1).max() == 1.0


class ClassToken(nn.Module):
    """A transformer of two blocks whose head reads the first token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens)[:, 0])


def test_where_only_the_class_token_is_read_the_grid_before_the_last_block_counts():
    torch.manual_seed(0)
    model, images = ClassToken().eval(), noise(2)
    layer = attention_layer(model, images)
    assert layer == "blocks.0"
    maps, alpha = class_gradients(model, images, torch.tensor([0, 1]), layer)
    assert maps.shape == (2, 8, 4, 4)
    assert (alpha.abs().amax(1) > 0).all()


def test_dropped_tokens_make_no_grid_so_an_earlier_map_counts():
    model = VisionTransformer(width=16, depth=3, patch_size=4, num_heads=2, keep_tokens=(16, 10, 4))
    net = model.build(4, SHAPE).eval()
    assert attention_layer(net, noise(2)) == "blocks.0"


def test_images_that_are_not_square_have_grids_of_their_proportions():
    class Strip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(1, 5, 4, stride=4)
            self.tokens = nn.Identity()
            self.head = nn.Linear(5, 3)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.tokens(self.patches(images).flatten(2).transpose(1, 2)).mean(1))

    net, images = Strip(), noise(2, shape=(1, 8, 24))
    assert attention_layer(net, images) == "tokens"
    maps, _ = class_gradients(net, images, torch.tensor([0, 1]), "tokens")
    torch.testing.assert_close(maps, net.patches(images).detach())


def test_a_network_without_places_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(256, 4))
    with pytest.raises(ShapeError, match="Use occlusion_drops"):
        attention_layer(flat, noise(2))
    with pytest.raises(ShapeError, match="Leave the layer to attention_layer"):
        grad_cam(cnn(0), noise(2), torch.tensor([0, 1]), layer="head")


def flat(values: Tensor) -> list[float]:
    return values.flatten().tolist()


def test_agreement_is_correlation_of_values_and_of_ranks_with_ties():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(5, 6, 7, generator=generator).mul(4).round()  # many ties
    second = (first + torch.rand(5, 6, 7, generator=generator) * 3).round()
    found = compare_maps(first, second)
    for one, other, each in zip(first, second, found.images, strict=True):
        assert each is not None
        assert each.pearson == pytest.approx(np.corrcoef(one.flatten(), other.flatten())[0, 1])
        ranks = [[sum(w < v for w in x) + (sum(w == v for w in x) - 1) / 2 for v in x] for x in map(flat, (one, other))]
        assert each.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found.pearson == pytest.approx(np.mean([each.pearson for each in found.images if each]))


def test_the_highest_fifth_of_two_maps_overlaps_by_hand():
    first = torch.zeros(1, 1, 10)
    second = torch.zeros(1, 1, 10)
    first[0, 0, :2] = torch.tensor([5.0, 4.0])
    second[0, 0, 1:3] = torch.tensor([5.0, 4.0])
    found = compare_maps(first, second)
    assert found.iou == pytest.approx(1 / 3)
    second[0, 0, 1] = 0
    assert compare_maps(first, second).iou == 0


def test_maps_without_any_difference_are_skipped_and_counted():
    first, second = torch.rand(4, 3, 3), torch.rand(4, 3, 3)
    first[1], second[2] = 0.0, 2.5
    found = compare_maps(first, second)
    assert (found.skipped, found.num_images) == (2, 4)
    assert [each is None for each in found.images] == [False, True, True, False]
    nothing = compare_maps(torch.zeros(2, 3, 3), second[:2])
    assert (nothing.pearson, nothing.spearman, nothing.iou, nothing.skipped) == (None, None, None, 2)
    assert Agreement.model_validate_json(nothing.model_dump_json()) == nothing


def test_maps_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="expected \\[N, H, W\\] twice"):
        compare_maps(torch.rand(2, 3, 3), torch.rand(2, 3, 4))
    with pytest.raises(CompressionError, match="not finite"):
        compare_maps(torch.rand(1, 3, 3) * float("nan"), torch.rand(1, 3, 3))


def corner(images: Tensor) -> Tensor:
    """A model that looks at the upper left quarter alone."""
    evidence = images[:, 0, :4, :4].mean((1, 2))
    return torch.stack([evidence, -evidence], dim=1)


def test_covering_what_a_model_looks_at_costs_probability_and_nothing_else_does():
    images = torch.zeros(3, 1, 8, 8)
    images[:, :, :4, :4] = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1, 1)
    drops = occlusion_drops(corner, images, torch.zeros(3, dtype=torch.int64), patch=0.5)
    assert drops.shape == (3, 3, 3)
    assert (drops[:, 0, 0] > 0).all()
    assert (drops.flatten(1).argmax(1) == 0).all()
    assert torch.equal(drops[:, 2], torch.zeros(3, 3, dtype=torch.float64))
    other = occlusion_drops(corner, images, torch.ones(3, dtype=torch.int64), patch=0.5)
    torch.testing.assert_close(other, -drops)


def test_the_patch_reaches_every_edge_and_leaves_the_images_alone():
    images = noise(1, shape=(1, 9, 11))
    kept, seen = images.clone(), torch.zeros(9, 11, dtype=torch.bool)

    def watch(shown: Tensor) -> Tensor:
        seen.logical_or_((shown != kept)[0, 0])
        return torch.zeros(1, 2)

    drops = occlusion_drops(watch, images, torch.tensor([0]), patch=0.3)
    assert seen.all()
    assert torch.equal(images, kept)
    assert not drops.any()


def test_occlusion_of_a_network_agrees_with_itself():
    model, images, classes = cnn(3), noise(4), torch.tensor([0, 1, 2, 3])
    drops = occlusion_drops(model, images, classes)
    assert compare_maps(drops, occlusion_drops(model, images, classes)).spearman == pytest.approx(1.0)


def test_the_stage_compares_students_by_gradients_and_graphs_by_occlusion(tmp_path: Path):
    from export.onnx_graph import to_onnx
    from export.report.figures_attention import figures, section
    from export.temperature import store_temperature
    from tasks.artifacts import Store
    from tasks.attention import compare_attention
    from tasks.stage import StageResult, Work

    store = Store(tmp_path / "store")
    store.prepare()
    work: Any = Work(store=store, run=None, scratch=tmp_path, report=lambda text, done, total: None)
    dataset = tiny_dataset()

    def kept(name: str, write: Any) -> StageResult:
        with store.put(name) as draft:
            write(draft.folder)
        return StageResult(stage=name, name=name, key=name, artifact=draft.done())

    def checkpoint(seed: int) -> Any:
        spec = ModelSpec(
            model=CNN,
            num_classes=4,
            input_shape=dataset.input_shape,
            class_names=dataset.class_names,
            preprocessing=dataset.preprocessing,
        )
        return lambda folder: save_checkpoint(cnn(seed), spec, folder)

    def graph(folder: Path) -> None:
        path = folder / "model.onnx"
        to_onnx(cnn(1), path, input_shape=dataset.input_shape, metadata={}, fast=True)
        store_temperature(path, path, 3.0, apply=True)

    inputs: dict[str, Any] = {
        "config": AttentionConfig(images=10, pictures=2),
        "teacher": kept("teacher", checkpoint(0)),
        "students": {"a": kept("a", checkpoint(0)), "b": kept("b", checkpoint(1))},
        "quantized": {"b": kept("graph", graph)},
        "data": kept("data", lambda folder: save_dataset(dataset, folder)),
    }
    found = compare_attention.fn(work, name="attention", seed=0, **inputs)
    assert found.metrics["a/grad_cam_pearson"] == pytest.approx(1.0)
    assert found.metrics["a/occlusion_spearman"] == pytest.approx(1.0)
    content = json.loads((store.open(found.artifact) / "attention.json").read_text())
    rows = {(row["model"], row["method"], row["against"]): row for row in content["rows"]}
    same = rows["b.int8", "occlusion", "float student"]
    assert same["pearson"] == pytest.approx(1.0, abs=1e-4)  # though the graph divides by a temperature
    of_file, of_student = (rows[name, "occlusion", "teacher"]["pearson"] for name in ("b.int8", "b"))
    assert of_file == pytest.approx(of_student, abs=1e-3)
    assert ("b.int8", "grad_cam", "teacher") not in rows
    assert all(row["num_images"] == 10 for row in rows.values())
    assert {picture["id"] // 1000 for picture in content["pictures"]} == {1}  # the validation split
    assert compare_attention.fn(work, name="attention", seed=0, **inputs).artifact == found.artifact
    assert compare_attention.fn(work, name="attention", seed=1, **inputs).artifact != found.artifact

    assert [name for name, _ in section(content)["attention"]["plots"]] == ["attention_a", "attention_b"]
    drawn = {name: figure for name, (figure, _) in figures(content).items()}
    assert len(drawn["attention_a"].axes) == 2 * 3  # no INT8 file, no column for it
    assert len(drawn["attention_b"].axes) == 2 * 4
    assert drawn["attention_b"].axes[0].images[0].get_array().shape == (8, 8, 3)
    assert figures({}) == {}
    assert section({})["attention"]["table"]["rows"] == []
