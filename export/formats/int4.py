"""INT4 weights: linear layers stored as 4-bit blocks, everything computed in float.

Each block of consecutive inputs of an output shares a scale; activations stay float (weight-only quantization, as in
Frantar et al. 2022, arXiv:2210.17323, without their reordering). It saves the reading of large matrices, which is what
transformers wait for. Convolutions are left alone, and small convolutional networks gain nothing: their heads are
a few percent of their bytes. Only whole blocks are stored: TensorRT counts blocks and divides, so a shorter last block
would be read wrongly without a word, and ONNX Runtime leaves such a layer out of its 4-bit kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportError, ShapeError
from export.formats.opset import with_opset
from export.graph_editor import GraphEditor
from export.onnx_graph import GraphInfo, check_graph, load_graph, save_graph

if TYPE_CHECKING:
    from onnx import NodeProto

OPSET = 21
"""The first with 4-bit integers and scales per block."""
LARGEST = 7
"""A block's largest magnitude becomes 7; -8 is left unused, so that the integers are symmetric."""
BlockSize = Literal[32, 64, 128]


@dataclass(frozen=True)
class Int4Graph(GraphInfo):
    """The graph ``to_int4`` wrote, and what it changed."""

    layers: tuple[str, ...]
    """Names of the linear layers stored in 4 bits."""
    kept: tuple[str, ...]
    """Names of the linear layers left alone: their inputs fill no whole blocks, or they scale their product."""


def quantize_blocks(weight: NDArray, block_size: int) -> tuple[NDArray[np.int8], NDArray]:
    """Integers [inputs, outputs] in -7..7 and scales [blocks, outputs] of a weight [inputs, outputs].

    ``scale = amax / 7`` over a block of ``block_size`` consecutive inputs of one output; rounded to nearest, ties to
    even. A block of zeros has scale 1. No value moves by more than half a step.

    Raises:
        ShapeError: the inputs are no whole number of blocks.
    """
    inputs, outputs = weight.shape
    if inputs % block_size:
        raise ShapeError(
            f"A weight has {inputs} inputs, expected a multiple of {block_size}. Choose a smaller block, or keep it"
            " in float."
        )
    cut = weight.astype(np.float32).reshape(-1, block_size, outputs)
    scales = (np.abs(cut).max(axis=1) / LARGEST).astype(weight.dtype)
    scales[scales == 0] = 1
    counts = np.rint(cut / scales.astype(np.float32)[:, None]).clip(-LARGEST, LARGEST).astype(np.int8)
    return counts.reshape(-1, outputs), scales


def to_int4(
    source: Path, target: Path, *, block_size: BlockSize = 32, metadata: Mapping[str, str] | None = None
) -> Int4Graph:
    """Facts about the copy of a float graph whose linear layers are stored in 4 bits.

    A ``Gemm`` or ``MatMul`` with a stored weight becomes ``DequantizeLinear`` (scales per block) and ``MatMul``, which
    ONNX Runtime fuses to one kernel (``MatMulNBits``; it rounds activations to INT8 inside) and TensorRT to one layer.
    ONNX Runtime 1.31 doesn't where a ReLU follows directly; it then unpacks the weight at every call. Layers whose
    inputs fill no whole blocks stay as they are.

    Args:
        source: A float32 or float16 graph.
        target: Where the copy goes, in opset 21 or newer.
        block_size: Inputs that share a scale.
        metadata: Stored in the file; None keeps the source's.

    Raises:
        ExportError: no linear layer has whole blocks: there is nothing to gain.
    """
    from onnx import helper

    proto = with_opset(load_graph(source), OPSET)
    editor = GraphEditor(proto)
    done, kept = [], []
    for node in list(proto.graph.node):
        if node.op_type not in ("Gemm", "MatMul") or len(node.input) < 2:
            continue
        weight = editor.value(node.input[1])
        if weight is None or weight.ndim != 2:
            continue  # a product of two activations
        options = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0 and not options.get("transA", 0)
        matrix = weight.T if options.get("transB", 0) else weight
        if not plain or len(matrix) % block_size:
            kept.append(node.name)
            continue
        _store(editor, node, np.ascontiguousarray(matrix), block_size)
        done.append(node.name)
    if not done:
        raise ExportError(
            f"Graph '{source.name}' has no linear layer whose inputs are a multiple of {block_size}, expected one to"
            " store in 4 bits. Choose int8: INT4 gains nothing here."
        )
    del proto.graph.value_info[:]
    editor.drop_unused()
    save_graph(proto, target, metadata=metadata)
    return Int4Graph(**vars(check_graph(target)), layers=tuple(done), kept=tuple(kept))


def _store(editor: GraphEditor, node: "NodeProto", matrix: NDArray, block_size: int) -> None:
    """Replace, in place, a linear layer by its 4-bit weight, a product and its bias."""
    import ml_dtypes
    from onnx import helper

    counts, scales = quantize_blocks(matrix, block_size)
    name = node.name or node.output[0]
    inputs = [
        editor.constant(counts.astype(ml_dtypes.int4), f"{name}_int4"),
        editor.constant(scales, f"{name}_scales"),
    ]
    unpacked, output = f"{name}_weight", node.output[0]
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    product = output if bias is None else f"{name}_product"
    new = [
        helper.make_node("DequantizeLinear", inputs, [unpacked], name=unpacked, axis=0, block_size=block_size),
        helper.make_node("MatMul", [node.input[0], unpacked], [product], name=name),
    ]
    if bias is not None:
        new.append(helper.make_node("Add", [product, bias], [output], name=f"{name}_bias"))
    position = list(editor.graph.node).index(node)
    editor.graph.node.remove(node)
    for offset, added in enumerate(new):
        editor.graph.node.insert(position + offset, added)
    editor.index()
