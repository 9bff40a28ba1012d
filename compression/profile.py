"""Size and arithmetic of a network; what it costs on a device is measured in ``export/benchmark.py``."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compression.features import frozen


def params(model: nn.Module) -> int:
    """Number of parameters, trainable or not; shared ones count once. Buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one forward pass for one image [C,H,W]; 1 MAC = 2 FLOPs.

    Convolutions, matrix products and attention count, normalisation and activations do not (torch's own
    counter). The model is unchanged.
    """
    like = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_shape, dtype=like.dtype, device=like.device)
    counter = FlopCounterMode(display=False)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    # The counter does not see into the CPU's fused attention; spelt out as products it does.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with frozen(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return counter.get_total_flops() // 2


def state_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers as they lie in memory; shared ones count once."""
    sizes = {
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): tensor.nbytes
        for tensor in model.state_dict().values()
    }
    return sum(sizes.values())
