"""INT8: placement, ranges, simulated rounding, fine-tuning and conversion."""

from compression.quantize.annotator import SymmetricInt8
from compression.quantize.control import AccuracyControl
from compression.quantize.number_format import NumberFormat
from compression.quantize.prepared import FakeQuantized, Quantized, convert, prepare_qat
from compression.quantize.ptq import Ptq, ptq
from compression.quantize.qat import Qat, qat
from compression.quantize.student import (
    AnyQuantizer,
    QuantizedStudent,
    StoredStudent,
    load_quantized,
    quantize,
    save_quantized,
)

__all__ = [
    "AccuracyControl",
    "AnyQuantizer",
    "FakeQuantized",
    "NumberFormat",
    "Ptq",
    "Qat",
    "Quantized",
    "QuantizedStudent",
    "StoredStudent",
    "SymmetricInt8",
    "convert",
    "load_quantized",
    "prepare_qat",
    "ptq",
    "qat",
    "quantize",
    "save_quantized",
]
