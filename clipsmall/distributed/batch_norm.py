"""Batch normalisation over all ranks, on any device."""

import torch
from torch import Tensor, nn

from clipsmall.distributed import similarity, world


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), x − mean (b, D) and variance (D,) over all ranks' rows; differentiable, at least
    in float32.

    The variance is divided by N, and summed from differences: E[x²] − E[x]² loses all digits at a
    mean of 1,000 σ. Every rank must bring the same b, as for `world.gather`.
    """
    x = x.to(similarity.wide(x))
    rows = len(x) * world.size()
    mean = world.add(x.sum(dim=0)) / rows
    centred = x - mean
    return mean, centred, world.add(centred.square().sum(dim=0)) / rows


class GlobalBatchNorm(nn.Module):
    """Batch normalisation of (b, D) over all ranks' rows: nn.BatchNorm1d of one process, on GPUs
    and CPU ranks.

    torch's SyncBatchNorm refuses CPU tensors. In evaluation the running statistics serve, as in
    torch: the variance unbiased, `momentum` the new batch's share.
    """

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, D) -> (b, D). Raises ValueError in training for a single row over all ranks: it has
        no variance.
        """
        if self.training:
            rows = len(x) * world.size()
            if rows < 2:
                raise ValueError(
                    "batch normalisation compares pairs: it needs a batch of at least 2"
                )
            mean, centred, variance = moments(x)
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(
                    variance.to(self.running_var.dtype) * (rows / (rows - 1)), self.momentum
                )
        else:
            centred = x.to(similarity.wide(x)) - self.running_mean
            variance = self.running_var
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).to(x.dtype)
