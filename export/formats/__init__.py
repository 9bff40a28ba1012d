"""Number formats beside float32, float16 and INT8: each an edit of a finished ONNX graph, one file per format.

An edit reads a graph, writes another one, and never touches a model. What a runtime of this machine can't run is
``NOT_RUN_HERE``: such files are checked, measured in bytes and reported as built, never as passed.
"""

from export.formats.bfloat16 import bfloat16_predict, to_bfloat16
from export.formats.fp8 import activation_ranges, to_fp8
from export.formats.int4 import Int4Graph, to_int4

NOT_RUN_HERE: dict[str, str] = {
    "bfloat16": "ONNX Runtime has no bfloat16 convolutions on CPUs",
}
"""Form of a graph -> why ONNX Runtime doesn't run it on a CPU."""

__all__ = ["NOT_RUN_HERE", "Int4Graph", "activation_ranges", "bfloat16_predict", "to_bfloat16", "to_fp8", "to_int4"]
