"""One step of the real training loop on abstract tensors, with memory and FLOPs counted."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from clipsmall.batch import Embeddings, Pairs, Progress
from clipsmall.build import objective as build_objective
from clipsmall.build import run as build
from clipsmall.config import Config
from clipsmall.config.reader import validated
from clipsmall.model.towers import Loaded, Towers
from clipsmall.plan.cuda_kernels import as_on_cuda
from clipsmall.plan.fake_ranks import fake_ranks
from clipsmall.plan.meter import HOST, Meter
from clipsmall.train import train
from clipsmall.training.optim import Guard

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Machine(NamedTuple):
    """The devices to plan for."""

    # cuda or cpu
    device: str
    ranks: int


class Step(NamedTuple):
    """What a training step needs on one rank."""

    # pairs per rank
    rows: int
    # bytes at the peak by label: weights, gradients, optimizer, activations, pixels, loss, memory,
    # averaged towers, and DDP's buckets
    bytes: dict[str, int]
    flops: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Abstract(FakeTensorMode):  # type: ignore[no-untyped-call]
    """A FakeTensorMode that is not duplicated by deepcopy.

    Copying a tensor (for an averaged tower) copies its mode, and tensors of two modes do not mix.
    """

    def __deepcopy__(self, memo: Any) -> "Abstract":
        return self


def measure_step(config: Config, machine: Machine, rows: int, hollow: bool = False) -> Step:
    """Measure the second of two steps with `rows` pairs per rank.

    In the second step the optimizer has its state, and queues are full.

    Args:
        hollow: replace the towers by ones that cost nothing, to measure only the loss.

    Raises:
        ValueError: what a run of this config would raise before its first step.
    """
    config = of_batch(config, rows * machine.ranks)
    meter = Meter()
    kernels = as_on_cuda(meter) if machine.device == "cuda" else nullcontext()
    with fake_ranks(machine.ranks), Abstract(), meter, modules_stay(), kernels:
        stage = Stage(config, machine, meter, hollow)
        stage.first_step()
        stage.second_step(rows)

    parts = dict(meter.peak)

    # DDP's copy of the gradients for the all-reduce: gradient_as_bucket_view is off by default
    if machine.ranks > 1:
        parts["DDP's buckets"] = stage.trainable
    return Step(rows, parts, meter.flops)


def of_batch(config: Config, batch: int) -> Config:
    """The config with another batch, fresh weights, and no evaluations."""
    tree = config.model_dump(mode="json")
    tree["data"]["batch_size"] = batch
    tree["model"]["pretrained"] = "none"
    tree["evaluate"] = {}

    # a run must have at least one step
    tree["optim"]["pairs"] = max(config.optim.pairs, batch)
    return validated(tree)


@contextmanager
def modules_stay() -> Iterator[None]:
    """Inside, `Module.to` does nothing: it cannot move abstract parameters (torch 2.14)."""
    with patch.object(nn.Module, "to", lambda module, *_, **__: module), warnings.catch_warnings():
        # raised when a tower is copied
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


class Hollow(Towers):
    """Towers of the same width that compute next to nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.words = nn.Embedding(2, 1)

    def image(self, pixels: Tensor) -> Tensor:
        return pixels.flatten(1)[:, :1] * self.weight

    def text(self, ids: Tensor) -> Tensor:
        return ids[:, :1] * self.weight

    def checkpoint_activations(self) -> None:
        """Nothing to do: there are no large activations."""


def hollowed(loaded: Loaded) -> Loaded:
    return replace(
        loaded, towers=Hollow(build_objective.width(loaded)), spec=replace(loaded.spec, size=1)
    )


class Stage:
    """Everything that a run builds before its first step, on abstract tensors."""

    def __init__(self, config: Config, machine: Machine, meter: Meter, hollow: bool) -> None:
        self.config = config
        self.machine = machine
        self.meter = meter
        # one caption suffices: the vocabulary of our own towers does not depend on the data
        no_data: Any = SimpleNamespace(captions=lambda: ["a"])
        loaded = build.loaded_towers(config, no_data, None)
        loaded = hollowed(loaded) if hollow else loaded

        # assume that all pairs differ: the data may be on another machine
        ids = torch.arange(config.optim.pairs)
        self.loaded = loaded
        self.context = build.run_context(config, loaded, ids)
        self.encoder = build.dual_encoder(config, loaded, self.context).train()
        on_cpu: Any = SimpleNamespace(device=torch.device("cpu"))
        build.save_memory(config, on_cpu, loaded, self.encoder)
        for head in self.encoder.heads.values():
            if hasattr(head, "average"):
                meter.label(tensors(head.average), "averaged towers")

        meter.label([ids], HOST)
        self.objective = build.objective(config, self.context)
        if isinstance(self.objective, nn.Module):
            meter.label(tensors(self.objective), "memory")
        self.optimizer = build.optimizer(config, self.encoder)
        # bytes of trainable parameters
        self.trainable = 0
        for parameter in self.encoder.parameters():
            if parameter.requires_grad:
                self.trainable += parameter.untyped_storage().nbytes()
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda p: meter.label([p.grad], "gradients")
                )

    def first_step(self) -> None:
        """A step without a loss, in which the optimizer creates its state."""
        for parameter in self.encoder.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

        for group in self.optimizer.param_groups:
            # as optim.adamw sets it on this device
            group["fused"] = self.machine.device == "cuda"

        with self.meter.labelled("optimizer"):
            self.optimizer.step()
        self.optimizer.zero_grad()

    def second_step(self, rows: int) -> None:
        """The real loop, for one batch of `rows` pairs."""
        meter = self.meter
        encoder = self.encoder
        self.optimizer.register_step_pre_hook(lambda *_: setattr(meter, "making", "optimizer"))
        encoder.forward = self.as_activations(encoder.forward)  # type: ignore[method-assign]

        # fp16's GradScaler is left out: it holds only two numbers
        accelerator: Any = SimpleNamespace(
            backward=self.backward, unscale_gradients=lambda: None, scaler=None
        )
        columns = build_objective.columns_of_exchange(self.config.objective.exchange)
        batch = self.pairs(rows)
        schedule = build.scheduler(self.config, self.optimizer)
        guard = Guard(None, self.config.run.max_bad_steps, encoder)
        meter.restart()
        train(
            accelerator,
            encoder,
            self.as_loss(columns),
            self.as_loss(self.objective),
            [batch],
            guard,
            self.optimizer,
            schedule,
            self.config.optim.clip,
            Progress(),
            [],
        )

    def pairs(self, rows: int) -> Pairs:
        """A batch of `rows` pairs, all different."""
        side = self.loaded.spec.size
        ids: Tensor = self.loaded.tokenize(["a"])
        made = Pairs(
            torch.zeros(rows, 3, side, side, dtype=torch.uint8),
            torch.ones(rows, ids.shape[1], dtype=ids.dtype),
            torch.arange(rows),
            torch.arange(rows),
        )
        self.meter.label(made, "pixels")

        # with chunks, pixels go to the device one chunk at a time; but DDP copies all of them
        if self.machine == ("cuda", 1) and self.encoder.chunk_size:
            self.meter.label([made.image], HOST)
        return made

    def as_activations(self, forward: Any) -> Any:
        """`forward` in the config's precision, as Accelerate wraps it; new tensors are activations.

        So are those of the backward pass once the gradients of both embeddings are known.
        """
        precision = self.config.run.precision
        if precision == "auto":
            # bf16 takes as many bytes
            precision = "fp16" if self.machine.device == "cuda" else "fp32"

        if precision in DTYPES:
            forward = torch.autocast("cpu", dtype=DTYPES[precision])(forward)
            forward = convert_outputs_to_fp32(forward)

        def wrapped(pairs: Pairs) -> Embeddings:
            with self.meter.labelled("activations"):
                rows: Embeddings = forward(pairs)
            waiting = [rows.image, rows.text]

            def arrived(_: Tensor) -> None:
                waiting.pop()
                # the backward pass has finished with the loss and enters the towers
                if not waiting:
                    self.meter.making = "activations"

            for tensor in (rows.image, rows.text):
                tensor.register_hook(arrived)  # type: ignore[no-untyped-call]
            return rows

        return wrapped

    def backward(self, loss: Tensor) -> None:
        self.meter.making = "loss"
        torch.autograd.backward(loss)
        self.meter.making = "activations"

    def as_loss(self, function: Any) -> Any:
        """The function, with everything it allocates counted as the loss's."""

        def wrapped(*arguments: Any) -> Any:
            with self.meter.labelled("loss"):
                return function(*arguments)

        return wrapped


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
