"""The bank of past trials, and what the structure of a candidate says before training."""

import logging
import math

import pytest
import torch
from torch import nn

from compression import profile
from compression.checkpoint import save_checkpoint
from compression.models import ModelSpec, build_model
from compression.search.bank import PastTrial, features_at, features_of, past_trials, read_bank, task_of, write_bank
from compression.search.prune import prune_model
from compression.search.trials import OBJECTIVES, TrialResult
from compression.train import TrainConfig
from compression.zoo import AnyModel, DepthwiseCnn, PlainCnn, VisionTransformer
from tests.compression.tiny_data import tiny_dataset

PLAIN = PlainCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=4)


def candidate(model: AnyModel = PLAIN) -> tuple[nn.Module, ModelSpec]:
    data = tiny_dataset()
    spec = ModelSpec(
        model=model,
        num_classes=data.num_classes,
        input_shape=data.input_shape,
        class_names=data.class_names,
        preprocessing=data.preprocessing,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(spec).eval(), spec


def row(number: int, **changes) -> TrialResult:
    settings = {"state": "complete", "accuracy": 0.5 + number / 100, "macs": 1000, "params": 100, "size_bytes": 400}
    return TrialResult(number, "scale-plain_cnn", {"width": 1.0, "depth": number}, **(settings | changes))


def bank_of(rows: list[TrialResult], study: str = "s", **changes) -> list[PastTrial]:
    settings = {
        "task": task_of(tiny_dataset(), (0.6, 0.8)),
        "study": study,
        "objectives": OBJECTIVES,
        "kinds": {"scale-plain_cnn": "scale"},
        "train": TrainConfig(epochs=3, batch_size=30),
        "features": {each.number: {"log_macs": 3.0} for each in rows},
    }
    return past_trials(rows, **(settings | changes))


def test_a_bank_is_read_as_it_was_written_whatever_the_order_of_files(tmp_path):
    first, second = bank_of([row(0), row(1, latency_p50_ms=0.25, ece=0.01)]), bank_of([row(0), row(10), row(9)], "r")
    write_bank(tmp_path / "a" / "bank.jsonl", first)
    write_bank(tmp_path / "b.jsonl", second)
    paths = [tmp_path / "a" / "bank.jsonl", tmp_path / "b.jsonl"]
    found = read_bank(paths)
    assert found == read_bank(reversed(paths))
    assert [trial.place for trial in found] == [("r", 0), ("r", 9), ("r", 10), ("s", 0), ("s", 1)]
    assert found[3:] == first
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"bank.jsonl", "b.jsonl"}, "no draft stays"


def test_a_trial_counts_once(tmp_path):
    write_bank(tmp_path / "a", bank_of([row(0), row(1)]))
    write_bank(tmp_path / "b", bank_of([row(1), row(2)]))
    assert [trial.number for trial in read_bank([tmp_path / "a", tmp_path / "b", tmp_path / "a"])] == [0, 1, 2]


def test_what_is_damaged_is_left_out_and_logged(tmp_path, caplog):
    path = tmp_path / "bank.jsonl"
    write_bank(path, bank_of([row(0), row(1), row(2), row(3)]))
    lines = path.read_bytes().splitlines()
    too_good = lines[3].replace(b'"accuracy":0.53', b'"accuracy":1.53')
    assert too_good != lines[3]
    path.write_bytes(b"\n".join([lines[0], lines[1][:-20], b"\xff\xfe", too_good, lines[2]]))
    with caplog.at_level(logging.WARNING):
        found = read_bank([tmp_path / "gone.jsonl", path])
    assert [trial.number for trial in found] == [0, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert sum("gone.jsonl' cannot be read" in message for message in messages) == 1
    assert [message.split()[1] for message in messages if message.startswith("line")] == ["2", "3", "4"]
    assert any("accuracy" in message for message in messages)


def test_only_complete_trials_enter_with_their_features(tmp_path, caplog):
    model, spec = candidate()
    save_checkpoint(model, spec, tmp_path / "trial-0001")
    rows = [
        row(0, state="infeasible", accuracy=None),
        row(1, checkpoint=tmp_path / "trial-0001"),
        row(2, checkpoint=tmp_path / "gone"),
        row(3),
        row(4, state="filtered", accuracy=None),
    ]
    known = {"log_macs": 2.0}
    found = bank_of(rows, features={3: known}, teacher_accuracy=0.9)
    assert [trial.number for trial in found] == [1, 3]
    assert found[0].features == features_of(model, spec)
    assert found[1].features == known
    assert "trial 2 has no checkpoint" in caplog.text
    assert (found[0].kind, found[0].space, found[0].choices) == ("scale", "scale-plain_cnn", {"width": 1.0, "depth": 1})
    assert (found[0].epochs, found[0].steps) == (3, 3 * math.ceil(64 / 30))
    assert (found[0].task.classes, found[0].task.input_shape, found[0].task.train_images) == (4, (1, 8, 8), 64)


def test_features_count_what_there_is():
    model, spec = candidate()
    found = features_of(model, spec)
    assert found["log_macs"] == math.log10(profile.macs(model, spec.input_shape) + 1)
    assert found["log_params"] == math.log10(profile.params(model) + 1)
    assert found["log_size"] == math.log10(profile.state_bytes(model) + 1)
    assert found["depth"] == 4, "stem, two stages, head"
    assert [found["depth_0"], found["depth_1"], found["depth_2"]] == [2, 1, 0]
    assert [found[f"width_0_{name}"] for name in ("first", "last", "max", "mean")] == [2, 3, 3, 2.5]
    assert found["width_1_last"] == 4
    assert found["width_2_max"] == found["depthwise_share"] == found["other_share"] == found["tokens"] == 0


def test_features_know_depthwise_convolutions_and_attention():
    depthwise = DepthwiseCnn(widths=(8,), depths=(1,), strides=(1,), stem_width=8, stem_stride=1, kernel=3)
    model, spec = candidate(depthwise)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    wanted = sum(64 * conv.weight.numel() for conv in convolutions) / profile.macs(model, spec.input_shape)
    assert features_of(model, spec)["depthwise_share"] == pytest.approx(wanted)
    assert wanted > 0

    found = features_of(*candidate(VisionTransformer(width=16, depth=3, num_heads=2, patch_size=2, stem="patch")))
    assert (found["attention_blocks"], found["tokens"]) == (3, 16)
    products = 3 * 2 * 16 * 16 * 16  # queries with keys, then with values: 16 tokens, width 16
    assert found["other_share"] == pytest.approx(products / (10 ** found["log_macs"] - 1))


def test_features_see_what_pruning_removed(tmp_path):
    model, spec = candidate(PlainCnn(widths=(16, 16), depths=(1, 1), strides=(1, 2), stem_width=16))
    pruned, pruned_spec = prune_model(model, spec, ratio=0.5)
    before, after = features_of(model, spec), features_of(pruned, pruned_spec)
    assert before.keys() == after.keys()
    assert after["width_0_max"] == before["width_0_max"] - 1
    assert after["log_macs"] < before["log_macs"]
    save_checkpoint(pruned, pruned_spec, tmp_path)
    assert features_at(tmp_path) == after
    assert features_at(tmp_path / "other") is features_at(None) is None


def test_looking_at_a_candidate_leaves_it_as_it_was():
    model, spec = candidate()
    model.train()
    model.stem.eval()
    model.head.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    features_of(model, spec)
    assert [module.training for module in model.modules()] == modes
    assert not model.head.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
