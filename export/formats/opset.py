"""Newer versions of the ONNX standard, for formats that older ones don't know."""

from typing import TYPE_CHECKING

from compression.errors import ExportError

if TYPE_CHECKING:
    from onnx import ModelProto


def with_opset(proto: "ModelProto", opset: int) -> "ModelProto":
    """The same graph in at least this version of the standard, names and metadata kept.

    Raises:
        ExportError: an operator of the graph has no equivalent there.
    """
    import onnx

    found = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if found >= opset:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, opset)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(
            f"Graph '{proto.graph.name}' has an operator that opset {opset} writes otherwise ({reason}), expected one"
            " that both know. Export the model with that opset."
        ) from error
