"""What every space of a search promises; a new one is a row of CASES."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import save_file

from compression.card import MethodCard
from compression.checkpoint import load_checkpoint, save_checkpoint
from compression.errors import CompressionError
from compression.models import build_model, diff_edits
from compression.search import AnySpace
from compression.search.candidate import digest_of
from compression.search.space import Space, Workshop
from compression.search.spaces import (
    Design,
    FastNas,
    Layers,
    Prune,
    Scale,
    Shrink,
    Subnets,
    Tas,
    Tokens,
)
from compression.zoo import DepthwiseCnn, PlainCnn
from export.onnx_graph import to_onnx
from export.timing import open_session
from tests.compression.losses.short_training import one_thread, stored
from tests.compression.tiny_data import tiny_dataset
from tests.contracts.search_cases import FAMILIES, SHORT, workshop

BASE = PlainCnn(widths=(16, 16), depths=(1, 1), strides=(2, 2), stem_width=8)
CASES: dict[str, Space] = {
    **{f"prune-{name}": Prune(parent=name, ratios=(0.25, 0.5)) for name in FAMILIES},
    "prune-global": Prune(parent="residual", ranking="global", target="macs", ratios=(0.3, 0.6), criterion="taylor"),
    "prune-iterative": Prune(parent="plain", ratios=(0.5,), steps=2, between=SHORT),
    "prune-order": Prune(parent="plain", ratios=(0.5,), order=("prune_distil", "distil_prune"), between=SHORT),
    "prune-stages": Prune(parent="residual", stage_ratios=(0.0, 0.5)),
    "scale": Scale(base=BASE, widths=(0.5, 1.0), depths=(0, 1)),
    "design": Design(base=BASE, widths=((8, 16), (16, 24)), depths=((1,), (1, 2)), stem_widths=(8, 16)),
    "layers": Layers(parent="residual", shares=(0.3, 0.6)),
    "layers-transformer": Layers(parent="transformer", shares=(0.3,), cost="macs", rescore_every=1),
    "tokens": Tokens(parent="transformer", keeps=(0.5, 1.0)),
    "tas": Tas(parent="residual", targets=(0.5,), train=SHORT),
    "subnets": Subnets(
        base=DepthwiseCnn(widths=(16, 16), depths=(1, 2), strides=(1, 2), stem_width=16),
        widths=(0.5, 1.0),
        depths=((1,), (1, 2)),
        train=SHORT,
    ),
    "shrink": Shrink(parent="residual"),
    "fastnas": FastNas(parent="residual", shares=(0.7,)),
}
"""By name of the case: every kind at least once."""

NEEDS_EXTRA = {"fastnas": "modelopt"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Workshop:
    data = tiny_dataset()
    panel = [stored(data, tmp_path_factory.mktemp("panel"), width=8, seed=1)]
    return workshop(data, panel, tmp_path_factory.mktemp("shop"))


def again(shop: Workshop, folder) -> Workshop:
    """The same study started again with nothing kept."""
    return Workshop(shop.parents, shop.dataset, shop.seed, folder, shop.start_training, shop.latency, shop.best_teacher)


def usable(name: str) -> Space:
    needed = NEEDS_EXTRA.get(name)
    if needed is not None and importlib.util.find_spec(needed) is None:
        pytest.skip(f"the extra with {needed} is not installed")
    return CASES[name]


def last_choices(space: Space, shop: Workshop) -> dict:
    return {gene: values[-1] for gene, values in space.genes(shop).items()}


def test_every_space_has_a_case():
    assert {type(space) for space in CASES.values()} == set(get_args(AnySpace))


@pytest.mark.parametrize("name", CASES)
def test_card_label_and_json(name):
    space = CASES[name]
    assert isinstance(space.card, MethodCard)
    assert all(len(text) > 5 for text in space.card.model_dump().values())
    assert space.label.replace("_", "").replace("-", "").isalnum()
    assert type(space).model_validate_json(space.model_dump_json()) == space


@pytest.mark.parametrize("name", CASES)
def test_genes_offer_something_and_numbers_ascend(name, shop):
    genes = usable(name).genes(shop)
    assert genes
    for values in genes.values():
        assert values
        assert len(set(values)) == len(values)
        if all(isinstance(value, int | float) for value in values):
            assert list(values) == sorted(values)


@pytest.mark.parametrize("name", CASES)
def test_candidate_is_rebuilt_from_its_checkpoint_and_from_its_choices(name, shop, tmp_path):
    """Bit for bit; without touching teachers or the random state; and its file says what torch says."""
    space = usable(name)
    choices = last_choices(space, shop)
    before = {each: digest_of(*pair) for each, pair in shop.parents.items()}
    with one_thread():
        state = torch.get_rng_state()
        model, spec = space.build(choices, shop)
        assert torch.equal(torch.get_rng_state(), state)
        twin, twin_spec = space.build(choices, again(shop, tmp_path / "other"))
    assert {each: digest_of(*pair) for each, pair in shop.parents.items()} == before
    assert digest_of(twin, twin_spec) == digest_of(model, spec)

    assert not model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    with torch.random.fork_rng():
        assert diff_edits(build_model(spec), model) == ()
    save_checkpoint(model, spec, tmp_path / "checkpoint")
    loaded, _ = load_checkpoint(tmp_path / "checkpoint")
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(loaded(images), logits)
    assert logits.shape == (5, 4)

    path = tmp_path / "candidate.onnx"
    to_onnx(model, path, input_shape=(1, 8, 8), metadata={}, fast=True)
    (found,) = open_session(path, threads=1).run(None, {"images": images.numpy()})
    assert abs(torch.from_numpy(found) - logits).max() < 1e-4


WITHOUT_LIBRARIES = """
import sys
for absent in ("torch_pruning", "optuna", "modelopt", "timm"):
    sys.modules[absent] = None  # importing it fails
from pathlib import Path
import torch
from safetensors.torch import load_file
from compression.checkpoint import load_checkpoint
from export.onnx_graph import to_onnx
from export.timing import open_session

torch.set_num_threads(1)
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model, spec = load_checkpoint(folder)
    kept = load_file(folder / "outputs")
    with torch.no_grad():
        assert torch.equal(model(kept["images"]), kept["logits"]), folder.name
    to_onnx(model, folder / "model.onnx", input_shape=spec.input_shape, metadata={}, fast=True)
    (found,) = open_session(folder / "model.onnx", threads=1).run(None, {"images": kept["images"].numpy()})
    assert abs(torch.from_numpy(found) - kept["logits"]).max() < 1e-4, folder.name
    print(folder.name)
"""


def test_all_are_rebuilt_and_exported_where_no_search_library_is_installed(shop, tmp_path):
    """In a process of its own: a checkpoint is a spec and weights, bit for bit, whatever made it."""
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [name for name in CASES if importlib.util.find_spec(NEEDS_EXTRA.get(name, "torch")) is not None]
    with one_thread():
        for name in names:
            model, spec = CASES[name].build(last_choices(CASES[name], shop), shop)
            save_checkpoint(model, spec, tmp_path / name)
            with torch.no_grad():
                save_file({"images": images, "logits": model(images)}, tmp_path / name / "outputs")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(names)


@pytest.mark.parametrize("name", [name for name, space in CASES.items() if getattr(space, "parent", None)])
def test_unknown_parent_is_refused_before_any_work(name, shop):
    space = usable(name).model_copy(update={"parent": "nobody"})
    with pytest.raises(CompressionError, match=r"parent 'nobody', expected one of depthwise, plain"):
        space.genes(shop)
