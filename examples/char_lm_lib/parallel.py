"""What the processes of a data-parallel run share; a run of one process is the simple case."""

import os
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def rank() -> int:
    """This process's number among those that torchrun started; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Team:
    """The processes of this run. Every method is called by all of them, in the same order."""

    def __init__(self) -> None:
        self.rank, self.size = rank(), world_size()
        self.leads = self.rank == 0  # the one that prints, saves and plots

    def __enter__(self) -> "Team":
        if self.size > 1:
            dist.init_process_group("gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.size > 1:
            dist.destroy_process_group()

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model for training steps: gradients are averaged over the processes."""
        return DistributedDataParallel(model) if self.size > 1 else model

    def share(self, tensor: Tensor, dim: int) -> Tensor:
        """This process's part of the batch, which is the axis `dim`."""
        return tensor.tensor_split(self.size, dim)[self.rank]

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The whole batch from every process's part: the inverse of `share`."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim)

    def sum(self, *values: float) -> list[float]:
        """The sums of each value over the processes."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()
