"""Graphs that several export tests look at, written once: exporting takes seconds."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compression.quantize import Quantized, convert, prepare_qat
from compression.zoo import ResidualCnn
from export.onnx_graph import GraphInfo, to_onnx

SHAPE = (1, 12, 12)
METADATA = {"class_names": '["a", "b", "c", "d"]', "lineage": "abc"}


def noise(count: int, seed: int = 0) -> Tensor:
    """Images [count, 1, 12, 12]."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Exported:
    """A small residual network: as a module, quantized, and as the graphs of both."""

    model: nn.Module
    quantized: Quantized
    float32: GraphInfo
    symmetric: GraphInfo
    shape: tuple[int, int, int] = SHAPE

    @staticmethod
    def images(count: int, seed: int = 0) -> Tensor:
        return noise(count, seed)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Exported:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder: Path = tmp_path_factory.mktemp("graphs")
    model = ResidualCnn(widths=(8, 16), depths=(1, 1), strides=(1, 2), stem_width=8).build(4, SHAPE)
    model.train()
    with torch.no_grad():
        for seed in range(20):
            model(noise(32, seed + 100))  # statistics that are not the initial ones
    model.eval()
    with torch.no_grad():  # logits that differ between images, as a trained model's do
        head = model.get_submodule("head")
        logits = model(noise(256, 7))
        head.weight.div_(logits.std())
        head.bias.sub_(logits.mean(0)).div_(logits.std())
    quantized = convert(prepare_qat(model, SHAPE, noise(256, 1)))
    return Exported(
        model=model,
        quantized=quantized,
        float32=to_onnx(model, folder / "float32.onnx", input_shape=SHAPE, metadata=METADATA),
        symmetric=to_onnx(quantized, folder / "int8.onnx", input_shape=SHAPE, metadata=METADATA),
    )
