"""Checkpoint folders come back bit for bit, without the code that pruned; all else is one clear error."""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch_pruning
from pydantic import ValidationError
from torch import nn

from compression.checkpoint import load_checkpoint, read_spec, save_checkpoint
from compression.errors import ArtifactError, CheckpointError, ShapeError
from compression.models import (
    AnyModel,
    ModelSpec,
    ReshapeParameter,
    ResizeModule,
    SetAttributes,
    build_model,
    diff_edits,
)
from compression.types import Preprocessing
from compression.zoo import DepthwiseCnn, Mixer, PlainCnn, ResidualCnn, TimmModel, VisionTransformer

ROOT = Path(__file__).parents[2]
SMALL = ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(2, 1), stem_width=8)
PRUNED: dict[str, tuple[AnyModel, tuple[int, int, int]]] = {
    "residual_cnn": (SMALL, (1, 8, 8)),
    "depthwise_cnn": (DepthwiseCnn(widths=(8, 16), depths=(1, 1), stem_width=8), (1, 8, 8)),
    "vision_transformer": (VisionTransformer(width=32, depth=2, num_heads=2, stem_width=8), (1, 8, 8)),
    "timm-resnet18": (TimmModel(name="resnet18"), (3, 32, 32)),
    "timm-test_vit": (TimmModel(name="test_vit"), (3, 32, 32)),
}
LOAD_WITHOUT_PRUNING = """
import json, sys
sys.modules["torch_pruning"] = None  # any import of it raises
import hashlib, torch
from pathlib import Path
from compression.checkpoint import load_checkpoint
torch.set_num_threads(1)
found = {}
for folder in map(Path, sys.argv[1:]):
    model, spec = load_checkpoint(folder)
    state = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()}
    images = torch.load(folder / "images.pt")
    torch.save(model(images), folder / "found.pt")
    found[folder.name] = {"state": state, "training": model.training, "edits": len(spec.edits)}
print(json.dumps(found))
"""


def spec_for(config: AnyModel, shape: tuple[int, int, int] = (1, 8, 8), num_classes: int = 5) -> ModelSpec:
    return ModelSpec(
        model=config,
        num_classes=num_classes,
        input_shape=shape,
        class_names=tuple(f"class {index}" for index in range(num_classes)),
        preprocessing=Preprocessing(scale=255, mean=(0.3,) * shape[0], std=(0.4,) * shape[0]),
    )


def prune(model: nn.Module, shape: tuple[int, int, int]) -> None:
    """Halve every width in place, the way torch-pruning documents it; attention heads stay."""
    attentions = [module for module in model.modules() if hasattr(module, "qkv")]
    for attention in attentions:
        attention.fused_attn = False
    heads = {attention.qkv: attention.num_heads for attention in attentions}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.randn(2, *shape),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[[module for module in model.modules() if isinstance(module, nn.Linear)][-1]],
        num_heads=heads,
        round_to=2,
    )
    pruner.step()
    for attention in attentions:
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        if hasattr(attention, "attn_dim"):
            attention.attn_dim = attention.num_heads * attention.head_dim
            attention.scale = attention.head_dim**-0.5


def jitter_statistics(model: nn.Module) -> None:
    """Give batch norms statistics of their own, as training would."""
    model.train()(torch.randn(8, *(1, 8, 8)))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory) -> dict[str, tuple[Path, nn.Module, ModelSpec]]:
    """Pruned networks, saved; each folder also holds some images."""
    root = tmp_path_factory.mktemp("pruned")
    networks = {}
    for name, (config, shape) in PRUNED.items():
        torch.manual_seed(1)
        base = spec_for(config, shape)
        model = build_model(base).eval()
        with pytest.warns() if "vi" in name else nullcontext():  # torch-pruning remarks on position tables
            prune(model, shape)
        spec = base.model_copy(update={"edits": diff_edits(build_model(base), model)})
        save_checkpoint(model, spec, root / name)
        torch.save(torch.randn(3, *shape), root / name / "images.pt")
        networks[name] = (root / name, model, spec)
    return networks


@pytest.fixture(scope="module")
def reloaded(pruned) -> dict[str, dict]:
    """What a process without torch-pruning found in those folders."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD_WITHOUT_PRUNING, *(str(folder) for folder, *_ in pruned.values())],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_network_comes_back_without_torch_pruning(name, pruned, reloaded):
    folder, model, spec = pruned[name]
    found = reloaded[name]
    state = model.state_dict()
    assert found["state"] == {key: hashlib.sha256(value.numpy().tobytes()).hexdigest() for key, value in state.items()}
    assert found["training"] is False
    assert found["edits"] == len(spec.edits) > 0
    images = torch.load(folder / "images.pt")
    torch.testing.assert_close(torch.load(folder / "found.pt"), model.eval()(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRUNED)
def test_pruned_network_gives_the_same_bits_here(name, pruned):
    folder, model, spec = pruned[name]
    again, found = load_checkpoint(folder)
    images = torch.load(folder / "images.pt")
    assert found == spec
    assert torch.equal(again(images), model.eval()(images))
    assert diff_edits(model, again) == ()
    assert sum(p.numel() for p in again.parameters()) < sum(
        p.numel() for p in build_model(spec.model_copy(update={"edits": ()})).parameters()
    )


def test_a_rebuilt_network_can_be_pruned_again(pruned, tmp_path):
    folder, _, spec = pruned["vision_transformer"]
    model, _ = load_checkpoint(folder)
    once = build_model(spec)
    with pytest.warns():
        prune(model, spec.input_shape)
    twice = spec.model_copy(update={"edits": spec.edits + diff_edits(once, model)})
    save_checkpoint(model, twice, tmp_path)
    images = torch.randn(2, *spec.input_shape)
    assert torch.equal(load_checkpoint(tmp_path)[0](images), model.eval()(images))


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        PlainCnn(widths=(8,), depths=(1,), strides=(1,)),
        Mixer(width=16, depth=1, stem_width=8),
        VisionTransformer(width=16, depth=1, num_heads=2, stem_width=8),
    ],
    ids=lambda config: config.kind,
)
def test_unpruned_network_comes_back_and_random_state_stays(config, tmp_path):
    model = build_model(spec_for(config))
    jitter_statistics(model)
    random_state = torch.get_rng_state()
    save_checkpoint(model, spec_for(config), tmp_path / "new" / "folder")
    again, spec = load_checkpoint(tmp_path / "new" / "folder")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (spec, read_spec(tmp_path / "new" / "folder")) == (spec_for(config), spec)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert not again.training


def test_files_depend_on_values_alone(tmp_path):
    model = build_model(spec_for(SMALL))
    save_checkpoint(model, spec_for(SMALL), tmp_path / "a")
    save_checkpoint(model.to(memory_format=torch.channels_last), spec_for(SMALL), tmp_path / "b")
    for file in ("spec.json", "weights.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["spec.json", "weights.safetensors"]


def test_shared_and_transposed_tensors_are_stored_whole(tmp_path):
    config = Mixer(width=16, depth=1, token_hidden=16, patch_size=2, stem_width=8)  # 16 tokens: square layers
    model = build_model(spec_for(config))
    block = model.blocks[0]
    block.over_tokens[0].weight = nn.Parameter(torch.randn(16, 16).T)
    block.over_tokens[2].weight = block.over_tokens[0].weight
    save_checkpoint(model, spec_for(config), tmp_path)
    again = load_checkpoint(tmp_path)[0].state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_saving_again_replaces(tmp_path):
    first, second = (build_model(spec_for(SMALL)) for _ in range(2))
    save_checkpoint(first, spec_for(SMALL), tmp_path)
    save_checkpoint(second, spec_for(SMALL), tmp_path)
    assert torch.equal(load_checkpoint(tmp_path)[0].head.weight, second.head.weight)


# ---------------------------------------------------------------- saving what could not be loaded


def test_a_spec_without_the_edits_is_refused(pruned, tmp_path):
    _, model, spec = pruned["residual_cnn"]
    with pytest.raises(CheckpointError, match="diff_edits"):
        save_checkpoint(model, spec.model_copy(update={"edits": ()}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_spec_of_another_network_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="another network"):
        save_checkpoint(build_model(spec_for(PlainCnn())), spec_for(SMALL), tmp_path)


def test_half_precision_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"bfloat16.*model\.float\(\)"):
        save_checkpoint(build_model(spec_for(SMALL)).bfloat16(), spec_for(SMALL), tmp_path)


def test_an_unwritable_folder_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtifactError, match="file"):
        save_checkpoint(build_model(spec_for(SMALL)), spec_for(SMALL), tmp_path / "file" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"class_names": ("only one",)}, "class_names has 1"),
        ({"preprocessing": Preprocessing(scale=1, mean=(0, 0, 0), std=(1,))}, "preprocessing.mean has 3"),
        ({"input_shape": (1, 0, 8)}, "greater than 0"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(change, said):
    with pytest.raises(ValidationError, match=said):
        ModelSpec.model_validate(spec_for(SMALL).model_dump() | change)


# ---------------------------------------------------------------- damaged or hostile checkpoint folders


@pytest.fixture
def folder(tmp_path) -> Path:
    save_checkpoint(build_model(spec_for(SMALL)), spec_for(SMALL), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewrite_spec(folder: Path, **changes: object) -> None:
    header = json.loads((folder / "spec.json").read_text())
    header["spec"] |= changes
    (folder / "spec.json").write_text(json.dumps(header))


@pytest.mark.parametrize("file", ["spec.json", "weights.safetensors"])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(folder)


def test_one_flipped_bit_shows_both_hashes(folder):
    path = folder / "weights.safetensors"
    content = bytearray(path.read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        load_checkpoint(folder)
    assert expected in str(refused.value)
    assert hashlib.sha256(content).hexdigest() in str(refused.value)


def test_an_unknown_field_in_the_spec_is_named(folder):
    rewrite_spec(folder, run_this="import os")
    with pytest.raises(CheckpointError, match=r"spec\.run_this"):
        load_checkpoint(folder)


def test_text_that_is_no_json_is_refused(folder):
    (folder / "spec.json").write_bytes(b"\x00garbage")
    with pytest.raises(CheckpointError, match=r"spec\.json that is not a spec"):
        load_checkpoint(folder)


def test_a_spec_of_another_number_of_classes_names_both(folder):
    rewrite_spec(folder, num_classes=7, class_names=list("abcdefg"))
    with pytest.raises(CheckpointError, match=r"5 classes in 'head\.weight', expected 7"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (ResizeModule(module="blocks.7", in_features=8, out_features=8), "blocks.7"),
        (ResizeModule(module="blocks", in_features=8, out_features=8), "Sequential"),
        (ResizeModule(module="stem.0", in_features=1, out_features=8, groups=3), "3 groups"),
        (ReshapeParameter(parameter="head.missing", shape=(3,)), "head.missing"),
        (ReshapeParameter(parameter="head.weight", shape=(3,)), "2 dimensions"),
        (SetAttributes(module="head", values={"forward": 1}), "'forward'"),
        (SetAttributes(module="head", values={"_version": 2}), "'_version'"),
        (SetAttributes(module="", values={"training": False}), "'training'"),
    ],
    ids=repr,
)
def test_an_edit_that_does_not_fit_is_named(folder, edit, said):
    rewrite_spec(folder, edits=[edit.model_dump()])
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(folder)


def test_a_changed_layer_is_not_an_edit():
    original, changed = (build_model(spec_for(SMALL)) for _ in range(2))
    changed.stem[2] = nn.GELU()
    with pytest.raises(ShapeError, match=r"'stem\.2' has type GELU, expected ReLU"):
        diff_edits(original, changed)
