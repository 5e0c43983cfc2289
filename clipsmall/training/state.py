"""Everything a checkpoint stores, and what a resumed run must have in common with it."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from clipsmall.batch import Progress
from clipsmall.distributed import world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.load import save_model_files
from clipsmall.model.towers import Loaded
from clipsmall.storage import checkpoint
from clipsmall.storage.checkpoint import CheckpointError
from clipsmall.training import fsdp
from clipsmall.training.feed import Feed

# Options that a resumed run must not change: they determine the order of pairs, the loss or the
# weights, so the checkpoint would not fit.
FIXED_OPTIONS = (
    "seed",
    "model.name",
    "objective.name",
    "objective.mask_duplicates",
    "objective.queue",
    "data.batch_size",
    "data.shuffle_window",
    "data.crop_scale",
    "data.max_pixels",
    "optim.lr",
    "optim.lr_scaling",
    "optim.accumulate",
    "optim.weight_decay",
    "optim.betas",
    "optim.eps",
    "optim.layer_decay",
    "tune.image",
    "tune.text",
    "tune.projections",
    "tune.logit_scale",
    "tune.logit_bias",
    "tune.lora",
)


@dataclass
class RunState:
    """Everything a checkpoint stores, in five kinds.

    Weights; optimizer and schedule; the objective's memory; the position in the data, with the
    mining plan; progress and random generators. Nothing else may be carried from step to step.
    """

    accelerator: Accelerator
    # the model without the DDP wrapper
    model: DualEncoder
    loaded: Loaded
    optimizer: Any
    scheduler: Any
    # a function, or a module with buffers if it keeps state between steps
    objective: Any
    feed: Feed
    progress: Progress
    # the run's whole config as JSON
    config: dict[str, Any]
    # identifies the training shards; must be the same when a run is resumed
    fingerprint: str
    # one phrase for the opening lines
    data_description: str = ""
    # options that this run cannot change, in addition to FIXED_OPTIONS
    fixed_options: tuple[str, ...] = ()

    @property
    def launch(self) -> dict[str, Any]:
        """Settings made by the launcher, which are in no config file."""
        return {
            "ranks": world.size(),
            "precision": self.accelerator.mixed_precision,
            "threads": torch.get_num_threads(),
        }

    def save(self, checkpoints: Path, keep: int) -> Path:
        """Write `step_N` and delete older checkpoints beyond `keep`.

        Every rank must call; the main one writes. Returns the new folder.
        """
        device = self.accelerator.device
        main = self.accelerator.is_main_process
        folder = checkpoint.step_folder(checkpoints, self.progress.step)

        # state that differs between ranks
        mine = {
            "rng": checkpoint.random_state(device),
            "feed": self.feed.state_dict(),
        }
        ranks = world.gather_bytes(json.dumps(mine).encode(), device)

        # gathering sharded tensors needs all ranks, too
        moments, optimizer_settings = checkpoint.split_optimizer(self.optimizer.state_dict())
        moments = fsdp.gathered(moments, keep=main)
        weights = fsdp.gathered(self.model.state_dict(), keep=main)

        if main:
            scaler = self.accelerator.scaler
            state = {
                "progress": self.progress.state_dict(),
                "optimizer": optimizer_settings,
                "scheduler": self.scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "ranks": [json.loads(data) for data in ranks],
                "config": {**self.config, "launch": self.launch},
                "data": self.fingerprint,
            }
            memory = self.objective.state_dict() if isinstance(self.objective, nn.Module) else {}
            plan = self.feed.mining.state_dict() if self.feed.mining else {}
            tensors = {
                "model": weights,
                "optimizer": moments,
                "objective": memory,
                "mining": plan,
            }
            checkpoint.save(
                folder, tensors, state, lambda path: save_model_files(self.loaded, path)
            )
            checkpoint.tidy(checkpoints, keep)
        # no rank may continue, and perhaps end the run, before the folder is complete
        world.barrier()
        return folder

    def load(self, folder: Path) -> None:
        """Restore everything from a checkpoint that has been verified.

        Raises:
            CheckpointError: it belongs to another run, or to other shards.
        """
        state = checkpoint.read_state(folder)
        self._refuse_another_run(folder, state)
        self._load_weights(folder)
        self._load_optimizer(folder, state)
        self._load_memory(folder)
        self.progress.step = state["progress"]["step"]
        self.progress.pairs = state["progress"]["pairs"]
        self._load_plan(folder)
        self._load_ranks(state["ranks"])

    def _load_weights(self, folder: Path) -> None:
        whole = checkpoint.read_tensors(folder, "model")
        weights = fsdp.scattered(whole, self.model.state_dict())
        try:
            differing = self.model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            # a tensor has another shape
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"{folder}: holds another model ({reason})") from None
        if names := [*differing.missing_keys, *differing.unexpected_keys]:
            raise CheckpointError(
                f"{folder}: holds another model (first differing weights: {', '.join(names[:3])})"
            )

    def _load_optimizer(self, folder: Path, state: dict[str, Any]) -> None:
        whole = checkpoint.read_tensors(folder, "optimizer")
        moments = fsdp.scattered_moments(whole, self.optimizer.param_groups)
        joined = checkpoint.joined_optimizer(moments, state["optimizer"])
        self.optimizer.load_state_dict(joined)
        self.scheduler.load_state_dict(state["scheduler"])
        # only fp16 has a scaler, and a resumed run may change its precision
        scaler = self.accelerator.scaler
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])

    def _load_memory(self, folder: Path) -> None:
        if not isinstance(self.objective, nn.Module):
            return
        try:
            self.objective.load_state_dict(checkpoint.read_tensors(folder, "objective"))
        except RuntimeError as error:
            raise CheckpointError(
                f"{folder}: the objective's saved buffers do not fit its present options: {error}"
            ) from None

    def _load_plan(self, folder: Path) -> None:
        if not self.feed.mining:
            return
        try:
            self.feed.mining.load_state_dict(checkpoint.read_tensors(folder, "mining"))
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None

    def _load_ranks(self, ranks: list[dict[str, Any]]) -> None:
        rank = world.rank()
        if len(ranks) == world.size():
            checkpoint.set_random_state(ranks[rank]["rng"], self.accelerator.device)
            self.feed.load_state_dict(ranks[rank]["feed"])
            return
        # The number of ranks has changed. The order of pairs does not depend on it. Random
        # generators (dropout) get a new seed, and the first rank keeps the counts of skipped pairs.
        set_seed(self.config["seed"] + self.progress.step * 1_000 + rank)
        if rank == 0:
            for each in ranks:
                self.feed.skips.merge(Feed.read_skips(each["feed"]))

    def _refuse_another_run(self, folder: Path, state: dict[str, Any]) -> None:
        """Raises CheckpointError if fixed options or the data differ; prints other changes."""
        was = flattened(state["config"])
        now = flattened({**self.config, "launch": self.launch})
        changed = changed_options(was, now)
        fixed = [name for name in changed if is_within(name, (*FIXED_OPTIONS, *self.fixed_options))]
        if fixed:
            differences = "; ".join(
                f"{name} was {changed[name][0]!r}, now {changed[name][1]!r}" for name in fixed
            )
            raise CheckpointError(
                f"{folder}: another run: {differences}. Change it back, or start a new run with "
                "another --out"
            )
        if state["data"] != self.fingerprint:
            raise CheckpointError(
                f"{folder}: data.train or data.plan has changed since (other pairs, sizes or "
                "batches); restore it"
            )
        changed.pop("resume", None)
        if changed and self.accelerator.is_main_process:
            changes = ", ".join(
                f"{name}: {old!r} -> {new!r}" for name, (old, new) in changed.items()
            )
            print(f"note: resumed with changes: {changes}", file=sys.stderr)


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one flat dict, with keys `section.field`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def changed_options(was: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options whose value changed: (old, new) by name, sorted by name.

    Options that did not exist when the checkpoint was saved are ignored, because the run behaved as
    their defaults say. Options that no longer exist are ignored, too.
    """
    changed = {}
    for name in sorted(now | was):
        if not is_known(name, was) or not is_known(name, now):
            continue
        old = was.get(name)
        new = now.get(name)
        if old != new:
            changed[name] = (old, new)
    return changed


def is_known(name: str, options: dict[str, Any]) -> bool:
    """Whether flattened options contain this option, a part of it, or a section around it.

    An option may be a value in one config and a section in the other: `objective.name` is a string
    or a mix of several objectives.
    """
    return any(is_within(name, (other,)) or is_within(other, (name,)) for other in options)


def is_within(name: str, sections: tuple[str, ...]) -> bool:
    """Whether an option is one of these sections or options, or lies inside one."""
    return any(f"{name}.".startswith(f"{section}.") for section in sections)
