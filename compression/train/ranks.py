"""What training on several processes asks beyond gradients: the same numbers on every rank.

One rank is one process with one device. Gradients of the model are exchanged by torch's DDP; here are the gradients of
helpers, the statistics of batch norm, and what cannot be done by several ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compression.errors import CompressionError


def mean_of(values: Tensor, fabric: Any) -> Tensor:
    """The mean over all ranks of a float tensor, on the device it came from; the tensor itself for one rank."""
    if fabric.world_size == 1:
        return values
    return fabric.all_reduce(values.to(fabric.device), reduce_op="mean").to(values.device)


def average_gradients(parameters: Sequence[nn.Parameter], fabric: Any) -> None:
    """Give parameters outside of the wrapped model the mean of all ranks' gradients, as DDP does for the model.

    One that has a gradient on no rank keeps none.
    """
    if fabric.world_size == 1 or not parameters:
        return
    shares = mean_of(torch.tensor([float(p.grad is not None) for p in parameters]), fabric).tolist()
    used = [p for p, share in zip(parameters, shares, strict=True) if share > 0]
    if not used:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in used]
    means = mean_of(torch.cat([grad.flatten() for grad in grads]), fabric).split([grad.numel() for grad in grads])
    for parameter, mean in zip(used, means, strict=True):
        parameter.grad = mean.view_as(parameter)


def agree_on_buffers(model: nn.Module, helpers: nn.Module, fabric: Any) -> None:
    """Give every rank the same buffers: the mean of the model's (statistics), the first rank's of helpers."""
    if fabric.world_size == 1:
        return
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(mean_of(buffer.detach().clone(), fabric))
    for buffer in helpers.buffers():
        torch.distributed.broadcast(buffer, src=0)


def first_decides(choice: bool, fabric: Any) -> bool:
    """The first rank's choice."""
    if fabric.world_size == 1:
        return choice
    told = torch.tensor(float(choice), device=fabric.device)
    torch.distributed.broadcast(told, src=0)
    return bool(told)


def part() -> None:
    """Called by each rank after its last training: leave when all are there."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def refuse_for_ranks(world_size: int, *, self_trained: Sequence[nn.Parameter], has_backward: bool) -> None:
    """Refuse what would train apart on each rank.

    Raises:
        CompressionError: a part has an optimiser or a backward pass of its own.
    """
    if world_size == 1 or not (self_trained or has_backward):
        return
    part = "a part with an optimiser of its own" if self_trained else "a loss that aligns gradients"
    raise CompressionError(
        f"Training on {world_size} processes has {part}, expected losses whose gradients can be averaged. "
        "Set STILLHOUSE_DEVICES=1, or take other losses."
    )


@contextmanager
def synchronised(model: nn.Module, fabric: Any) -> Iterator[None]:
    """Batch norm over the whole batch, not over each rank's share, while the block runs; on CUDA only.

    torch's SyncBatchNorm has no CPU kernel: there every rank normalises with its own share.
    """
    if fabric.world_size == 1 or fabric.device.type != "cuda":
        yield
        return
    replaced = replace_batch_norms(model)
    try:
        yield
    finally:
        for parent, name, original in replaced:
            setattr(parent, name, original)


def replace_batch_norms(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put SyncBatchNorms in place of batch norms, over the same parameters and buffers; returns what was there."""
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm) and not isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
                replaced.append((parent, name, child))
    return replaced
