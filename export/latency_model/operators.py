"""The operators of a network: one forward pass of the torch module, read as what ONNX Runtime will run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compression.features import frozen
from compression.search.space import Operator

BLOCK = 16
"""Channels ONNX Runtime's convolutions take at once where the CPU has AVX-512; 8 with AVX2, 1: no blocks."""

InputShape = tuple[int, int, int]

PRODUCTS = frozenset({"Conv", "Gemm", "MatMul", "BatchMatMul"})
"""Kinds that multiply and accumulate."""
_ROW_BY_ROW = frozenset({"Softmax", "LayerNormalization"})
_FOLDED = frozenset({"relu", "sigmoid", "tanh", "hardtanh", "clamp", "clamp_min", "leaky_relu"})
_VIEWS = frozenset(
    "view _unsafe_view reshape _reshape_alias expand alias detach unsqueeze squeeze select slice t clone contiguous "
    "_to_copy as_strided native_dropout dropout".split()
)
_NAMES = {
    "relu": "Relu",
    "hardtanh": "Clip",
    "clamp": "Clip",
    "clamp_min": "Clip",
    "_softmax": "Softmax",
    "native_layer_norm": "LayerNormalization",
    "native_group_norm": "GroupNormalization",
    "native_batch_norm": "BatchNormalization",
    "_native_batch_norm_legit_no_training": "BatchNormalization",
    "cat": "Concat",
    "transpose": "Transpose",
    "permute": "Transpose",
    "unbind": "Split",
    "split": "Split",
    "split_with_sizes": "Split",
    "max_pool2d_with_indices": "MaxPool",
    "avg_pool2d": "AveragePool",
    "_adaptive_avg_pool2d": "AveragePool",
    "mean": "ReduceMean",
}


def operators_of(model: nn.Module, input_shape: InputShape, *, block: int = BLOCK) -> list[Operator]:
    """The operators ONNX Runtime will run for one image, in order; one forward pass, milliseconds for a small net.

    Kinds are ONNX names, and beside them ``FusedAdd`` (a residual added inside a convolution), ``BatchMatMul`` (a
    product of two activations, channels summed over its ``groups``), ``Reorder`` (into channel blocks or out of them)
    and ``Attention`` (the small operators around one attention). Tokens are ``height``, with ``width`` 1. A mean over
    an image has the ``kernel`` of that area. Views, constants and what is folded away are left out. ``model`` is
    unchanged.
    """
    like = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    recorder = _Recorder(image, block)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one operator would hide the products inside
    try:
        with frozen(model), torch.no_grad(), recorder:
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return [operator for operator in recorder.operators if operator is not None]


def macs_of(operators: Sequence[Operator]) -> int:
    """Multiply-accumulates for one image."""
    return sum(
        each.height * each.width * each.kernel**2 * each.in_channels * each.out_channels // each.groups
        for each in operators
        if each.kind in PRODUCTS
    )


def in_blocks(operator: Operator, block: int) -> bool:
    """Whether ONNX Runtime runs this convolution on channels in blocks of ``block``, its fast way."""
    if operator.kind != "Conv" or block == 1:
        return False
    inputs, outputs = operator.in_channels // operator.groups, operator.out_channels // operator.groups
    if operator.groups == 1:
        return inputs < block or inputs % 4 == 0
    if inputs == outputs == 1:
        return operator.in_channels % 4 == 0
    return inputs % block == 0 and outputs % block == 0


@dataclass
class _Trace:
    """What is known of an activation while a network is looked at."""

    blocked: bool = False
    """Its channels lie in blocks."""
    takes_add: bool = False
    """The convolution behind it can still add a residual."""
    takes_activation: bool = False
    """The convolution behind it can still apply an activation."""
    bias: int | None = None
    """Place of the bias it was given as an operator of its own."""


class _Recorder(TorchDispatchMode):
    """Watches one forward pass and notes what ONNX Runtime will run in its place."""

    def __init__(self, image: Tensor, block: int) -> None:
        super().__init__()
        self.block = block
        self.operators: list[Operator | None] = []
        self._traces = {id(image): _Trace()}
        self._alive: list[Tensor] = [image]  # an id is free again as soon as its tensor is gone

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [each for each in args if isinstance(each, Tensor)]
        if args and isinstance(args[0], list | tuple):
            given += [each for each in args[0] if isinstance(each, Tensor)]
        results = [found] if isinstance(found, Tensor) else [each for each in found or () if isinstance(each, Tensor)]
        if results and any(id(each) in self._traces for each in given):
            trace = self._seen(func.overloadpacket.__name__.removesuffix("_"), args, given, results[0])
            for each in results:
                self._alive.append(each)
                self._traces[id(each)] = trace
        return found

    def _trace(self, tensor: Tensor) -> _Trace:
        return self._traces.get(id(tensor), _Trace())

    def _note(self, kind: str, tensor: Tensor, kernel: int = 1) -> int:
        """Notes an operator as large as ``tensor``; its place."""
        if tensor.dim() == 4 and kind not in _ROW_BY_ROW:
            channels, height, width = tensor.shape[1:]
        else:
            channels, width = (tensor.shape[-1] if tensor.dim() else 1), 1
            height = tensor.numel() // max(channels, 1)
        self.operators.append(Operator(kind, channels, channels, height, width, kernel))
        return len(self.operators) - 1

    def _unblocked(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            if (trace := self._trace(tensor)).blocked:
                self._note("Reorder", tensor)
                trace.blocked = False

    def _seen(self, name: str, args: tuple[Any, ...], given: list[Tensor], result: Tensor) -> _Trace:
        first = self._trace(given[0])
        if name == "convolution":
            return self._convolution(args, result)
        if name.startswith("_scaled_dot_product"):
            return self._attention(*given[:3])
        if name in ("addmm", "mm", "bmm", "baddbmm"):
            return self._product(name, given, result)
        if _NAMES.get(name) == "BatchNormalization" and first.takes_activation:
            return first
        if name in _FOLDED and first.takes_activation:
            return _Trace(first.blocked)
        if name in _VIEWS:
            if result.shape != given[0].shape:
                self._unblocked(given)
            return first
        if name == "add" and len(given) == 2 and given[0].shape == given[1].shape:
            pair = [self._trace(each) for each in given]
            if all(each.blocked for each in pair):
                fused = any(each.takes_add for each in pair)
                self._note("FusedAdd" if fused else "Add", result)
                return _Trace(blocked=True, takes_activation=fused)
        return self._other(name, args, given, result)

    def _convolution(self, args: tuple[Any, ...], result: Tensor) -> _Trace:
        images, weight, stride, groups = args[0], args[1], args[3][0], args[8]
        height, width = result.shape[2:]
        operator = Operator(
            "Conv", images.shape[1], result.shape[1], height, width, max(weight.shape[2:]), stride, groups
        )
        blocked = in_blocks(operator, self.block)
        if blocked and (groups > 1 or operator.in_channels >= self.block):
            if not self._trace(images).blocked:
                self._note("Reorder", images)
        else:
            self._unblocked([images])
        self.operators.append(operator)
        return _Trace(blocked, takes_add=blocked, takes_activation=True)

    def _product(self, name: str, given: list[Tensor], result: Tensor) -> _Trace:
        self._unblocked(given)
        left, right = given[-2:]
        if name in ("bmm", "baddbmm"):
            self._batched(left.shape[0], left.shape[1], left.shape[2], right.shape[2])
            return _Trace()
        kind = "MatMul" if left.shape[0] > 1 else "Gemm"
        self.operators.append(Operator(kind, left.shape[1], right.shape[1], left.shape[0], 1))
        return _Trace(bias=self._note("Add", result)) if name == "addmm" and kind == "MatMul" else _Trace()

    def _batched(self, groups: int, rows: int, inner: int, columns: int) -> None:
        self.operators.append(Operator("BatchMatMul", groups * inner, groups * columns, rows, 1, groups=groups))

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> _Trace:
        heads, tokens, inner = query.shape[1:]
        others, width = key.shape[2], heads * inner
        self.operators += [
            Operator("Attention", width, width, tokens, 1, groups=heads),
            Operator("Mul", width, width, tokens, 1),
            Operator("Mul", width, width, others, 1),
        ]
        self._batched(heads, tokens, inner, others)
        self.operators.append(Operator("Softmax", others, others, heads * tokens, 1))
        self._batched(heads, tokens, others, value.shape[3])
        return _Trace()

    def _other(self, name: str, args: tuple[Any, ...], given: list[Tensor], result: Tensor) -> _Trace:
        first = self._trace(given[0])
        kind = _NAMES.get(name, name.strip("_").title().replace("_", ""))
        stays = first.blocked and (kind in ("MaxPool", "AveragePool") or name in _FOLDED)
        if not stays:
            self._unblocked(given)
        if kind == "ReduceMean":
            area = given[0].numel() // max(result.numel(), 1)
            self._note(kind, result.reshape(1, -1, 1, 1), kernel=max(1, round(math.sqrt(area))))
        elif kind in ("MaxPool", "AveragePool"):
            size = args[1][0] if isinstance(args[1], list | tuple) else args[1]
            self._note(kind, result, kernel=given[0].shape[2] // result.shape[2] if name[0] == "_" else size)
        elif kind == "Gelu" and first.bias is not None:
            self.operators[first.bias] = None  # runs inside the activation
            self._note(kind, result)
        else:
            place = self._note(kind, given[0] if kind == "Split" else result)
            if kind == "Add" and len(given) == 2 and given[1].dim() == 1:
                return _Trace(bias=place)
        return _Trace(blocked=stays)
