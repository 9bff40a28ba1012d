"""A model while it learns to be INT8, and the INT8 model it becomes."""

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e import MovingAverageMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from compression.errors import CheckpointError, CompressionError
from compression.quantize.annotator import SymmetricInt8
from compression.quantize.folding import batch_norm, fold_batch_norms, hide_batch_norms, show_batch_norms
from compression.quantize.learned_steps import LearnedFakeQuantize
from compression.quantize.number_format import INT8, NumberFormat
from compression.quantize.observers import Magnitudes, find_range
from compression.quantize.rounding import SymmetricFakeQuantize

LOGGER = logging.getLogger(__name__)

CALIBRATION_BATCH = 64

_DROPOUTS = frozenset({torch.ops.aten.dropout.default, torch.ops.aten.dropout_.default})


def _mode_again(module: nn.Module, _keys: object) -> None:
    """After loading a state the freeze may be another one."""
    module.train(module.training)


class FakeQuantized(nn.Module):
    """A model whose weights and activations are rounded to INT8 in the forward pass, still trainable.

    ``train()`` and ``eval()`` work as on any module: in eval mode batch norm uses its running statistics,
    dropout is off and no range moves. After ``freeze()`` ranges, learned or observed, and batch norm statistics stay
    as they are in train mode too; the flag is part of the state, so a resumed training goes on in the same mode.
    Gradients pass the rounding unchanged inside the range and are 0 outside (straight-through estimator,
    Bengio et al. 2013, arXiv:1308.3432).
    """

    frozen: Tensor

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.body = graph
        self.register_buffer("frozen", torch.zeros((), dtype=torch.uint8))
        self.register_load_state_dict_post_hook(_mode_again)
        self.train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W]."""
        return self.body(images)

    def train(self, mode: bool = True) -> "FakeQuantized":
        """Set train or eval mode; returns the module itself."""
        self.training = mode
        moving = mode and not bool(self.frozen)
        for quantizer in self.quantizers():
            quantizer.adapt(moving)
        _set_mode(self.body, batch_norm_moves=moving, dropout=mode)
        return self

    def freeze(self) -> None:
        """Stop the ranges and the batch norm statistics, for the last part of a training."""
        self.frozen.fill_(1)
        self.train(self.training)

    def quantizers(self) -> list[SymmetricFakeQuantize]:
        """Every fake-quantizer, once."""
        return [module for module in self.body.modules() if isinstance(module, SymmetricFakeQuantize)]


class Quantized(nn.Module):
    """An INT8 model: integer weights, constant scales, ready for export; it can't be trained."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__()
        self.body = graph
        self.training = False

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W]."""
        return self.body(images)

    def train(self, mode: bool = True) -> "Quantized":
        """Change nothing: there is only one mode."""
        del mode
        return self


def prepare_qat(
    model: nn.Module,
    input_shape: tuple[int, int, int],
    calibration: Tensor | None,
    number_format: NumberFormat = INT8,
) -> FakeQuantized:
    """A copy of ``model`` with fake-quantizers, calibrated, in eval mode; the model stays as it is.

    Args:
        model: The float model.
        input_shape: Channels, height, width.
        calibration: Normalised images [N, C, H, W] that set the first activation ranges: the mean over batches of 64
            of the extremes, or what ``number_format.calibration`` finds in the magnitudes of all batches. None only
            before loading a state.
        number_format: Bits, ranges, and the layers that stay in float.

    Raises:
        CompressionError: the model can't be captured as a graph, has nothing to quantize, lacks a layer that
            ``keep_float`` names, or overflows on the calibration images.
    """
    # Eval mode: what else depends on the mode (stochastic depth) would be captured with its randomness.
    source = copy.deepcopy(model).eval()
    weight = next(source.parameters())
    # A plain example: channels-last strides would be baked into the graph as assumptions.
    example = torch.zeros(2, *input_shape, device=weight.device)
    try:
        program = torch.export.export(
            source, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
        )
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CompressionError(
            f"Model '{type(model).__name__}' has code torch.export can't capture ({first}), expected a"
            " static graph. Leave the quantize stage out for it."
        ) from error
    quantizer = SymmetricInt8(number_format)
    graph = program.module()
    if not isinstance(graph, GraphModule):
        raise CompressionError(
            f"Model '{type(model).__name__}' has a capture of type {type(graph).__name__}, expected a"
            " GraphModule. Update torch and torchao together."
        )
    prepared = FakeQuantized(prepare_qat_pt2e(hide_batch_norms(graph), quantizer))
    prepared.to(weight.device)
    if calibration is not None:
        _calibrate(prepared, calibration.to(weight.device).split(CALIBRATION_BATCH), number_format)
    return prepared


def convert(prepared: FakeQuantized) -> Quantized:
    """The INT8 model of a prepared one, which stays as it is: weights integer, batch norm folded."""
    body = copy.deepcopy(prepared).eval().body
    fold_batch_norms(body)
    body = convert_pt2e(body)
    if left := show_batch_norms(body):
        LOGGER.warning("Batch norm without a convolution before it stays in float: %s", ", ".join(left))
    return Quantized(body)


def save_prepared(prepared: FakeQuantized, path: Path) -> None:
    """Write weights, ranges and mode as .safetensors, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # Copies: one quantizer may stand at several places, and shared memory is refused.
    state = {name: tensor.detach().contiguous().clone() for name, tensor in prepared.state_dict().items()}
    save_file(state, temporary)
    temporary.replace(path)


def load_prepared(
    path: Path,
    model: nn.Module,
    input_shape: tuple[int, int, int],
    number_format: NumberFormat = INT8,
) -> FakeQuantized:
    """The prepared model that ``save_prepared`` wrote, bit for bit; ``model`` gives the architecture.

    Raises:
        CheckpointError: the file isn't readable or belongs to another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    prepared = prepare_qat(model, input_shape, None, number_format)
    try:
        state = OrderedDict(load_file(path))
        # Without versions the observers take it for an old state, and replace the smallest scale by torch's own.
        state._metadata = prepared.state_dict()._metadata  # pyright: ignore[reportAttributeAccessIssue]
        prepared.load_state_dict(state)
    except (OSError, SafetensorError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"Quantized checkpoint '{path.name}' has content that doesn't load ({first}), expected the state"
            f" of a prepared {type(model).__name__}. Run the quantize stage again."
        ) from error
    return prepared


@torch.no_grad()
def _calibrate(prepared: FakeQuantized, batches: Sequence[Tensor], number_format: NumberFormat) -> None:
    """Set the ranges from the float model: batch norm in eval mode, rounding off, observers on."""
    quantizers = prepared.quantizers()
    observers = [module for module in prepared.modules() if isinstance(module, MovingAverageMinMaxObserver)]
    constants = [observer.averaging_constant for observer in observers]
    for quantizer in quantizers:
        quantizer.enable_observer()
        quantizer.disable_fake_quant()
    searched = [] if number_format.calibration == "min_max" else [q for q in quantizers if not q.is_per_channel]
    with _magnitudes_of(searched) as seen:
        for count, batch in enumerate(batches, start=1):
            for observer in observers:
                observer.averaging_constant = 1 / count
            prepared.body(batch)
    for quantizer, magnitudes in zip(searched, seen, strict=True):
        quantizer.set_range(find_range(magnitudes.histogram(), number_format))
    for quantizer in quantizers:
        quantizer.enable_fake_quant()
    for observer, constant in zip(observers, constants, strict=True):
        observer.averaging_constant = constant
    _start_learning(prepared.body)
    prepared.eval()


@contextmanager
def _magnitudes_of(quantizers: Sequence[nn.Module]) -> Iterator[list[Magnitudes]]:
    """What passes through each of the quantizers inside the block."""
    seen = [Magnitudes() for _ in quantizers]

    def counting(magnitudes: Magnitudes) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: magnitudes.add(inputs[0])

    hooks = [
        quantizer.register_forward_pre_hook(counting(magnitudes))
        for quantizer, magnitudes in zip(quantizers, seen, strict=True)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _start_learning(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        quantizer = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(quantizer, LearnedFakeQuantize):
            source = node.args[0]
            quantizer.start(graph.get_parameter(source.target) if quantizer.is_per_channel else None)


def _set_mode(graph: GraphModule, *, batch_norm_moves: bool, dropout: bool) -> None:
    """Flip the train arguments in place: torchao's own switch resets epsilon and momentum to defaults."""
    changed = False
    for node in graph.graph.nodes:
        if node.target is batch_norm:
            position, mode = 5, batch_norm_moves
        elif node.target in _DROPOUTS:
            position, mode = 2, dropout
        else:
            continue
        if node.args[position] is not mode:
            node.args = (*node.args[:position], mode, *node.args[position + 1 :])
            changed = True
    if changed:
        graph.recompile()
