"""INT8: placement, simulated rounding, fine-tuning and conversion."""

from compression.quantize.annotator import SymmetricInt8
from compression.quantize.number_format import NumberFormat
from compression.quantize.prepared import FakeQuantized, Quantized, convert, prepare_qat
from compression.quantize.qat import (
    Qat,
    QuantizedStudent,
    StoredStudent,
    load_quantized,
    qat,
    quantize,
    save_quantized,
)

AnyQuantizer = Qat

__all__ = [
    "AnyQuantizer",
    "FakeQuantized",
    "NumberFormat",
    "Qat",
    "Quantized",
    "QuantizedStudent",
    "StoredStudent",
    "SymmetricInt8",
    "convert",
    "load_quantized",
    "prepare_qat",
    "qat",
    "quantize",
    "save_quantized",
]
