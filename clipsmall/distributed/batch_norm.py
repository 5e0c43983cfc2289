"""Batch normalisation over all ranks, on any device."""

import torch
from torch import Tensor, nn

from clipsmall.distributed import similarity, world


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), x − mean (b, D) and variance (D,) over the rows of all ranks; differentiable.

    x is (b, D), the local rows; sums are in float32 at least. The variance is the mean of squared
    differences over all rows; E[x²] − E[x]² would lose all digits at a mean of 1,000 σ. Every rank
    must call with the same b, because the forward and the backward pass exchange sums.
    """
    x = x.to(similarity.wide(x))
    rows = len(x) * world.size()
    mean = world.differentiable_sum(x.sum(dim=0)) / rows
    centred = x - mean
    squares = centred.square().sum(dim=0)
    variance = world.differentiable_sum(squares) / rows
    return mean, centred, variance


class GlobalBatchNorm(nn.Module):
    """Batch normalisation of (b, D) over the rows of all ranks, on GPUs and on CPUs.

    Equal to nn.BatchNorm1d in a single process with all rows; torch's SyncBatchNorm refuses CPU
    tensors. Evaluation uses running statistics, as in torch: the variance is unbiased, and
    `momentum` is the weight of the newest batch.
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
        """(b, D) -> (b, D), local rows. In training every rank must call.

        Raises:
            ValueError: in training, there is only one row over all ranks, which has no variance.
        """
        if self.training:
            rows = len(x) * world.size()
            if rows < 2:
                raise ValueError(
                    "batch normalisation compares pairs: it needs a batch of at least 2"
                )

            mean, centred, variance = moments(x)
            self._update_running(mean, variance, rows)
        else:
            centred = x.to(similarity.wide(x)) - self.running_mean
            variance = self.running_var

        normalised = centred * (variance + self.eps).rsqrt()
        return (normalised * self.weight + self.bias).to(x.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor, rows: int) -> None:
        dtype = self.running_mean.dtype
        self.running_mean.lerp_(mean.to(dtype), self.momentum)
        # as in torch, a batch is normalised by the biased variance, and the unbiased one is kept
        unbiased = variance.to(dtype) * (rows / (rows - 1))
        self.running_var.lerp_(unbiased, self.momentum)
