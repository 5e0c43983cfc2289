"""All state of a run in one place: what a checkpoint holds, and what a resumed run must share with
it.
"""

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
from clipsmall.training import fsdp as sharded
from clipsmall.training.feed import Feed

# A run that changes one of these is another run: its order, its loss or its weights would not be
# continued.
FIXED = (
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


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return found


def _known(key: str, tree: dict[str, Any]) -> bool:
    """Whether a flat tree has this option, or one inside it, or one it is inside of."""
    return any(
        f"{key}.".startswith(f"{each}.") or f"{each}.".startswith(f"{key}.") for each in tree
    )


@dataclass
class RunState:
    """The five homes of state: weights, optimizer and schedule, memory, place in the data, progress
    and RNG.
    """

    accelerator: Accelerator
    # unwrapped
    model: DualEncoder
    loaded: Loaded
    optimizer: Any
    scheduler: Any
    objective: Any
    feed: Feed
    progress: Progress
    # as JSON
    config: dict[str, Any]
    # of the training shards
    fingerprint: str
    # the training data in words
    source: str = ""
    # sections of the config that belong to this run, beside FIXED
    fixed: tuple[str, ...] = ()

    @property
    def launch(self) -> dict[str, Any]:
        """What the launcher decided, and no config file says."""
        return {
            "ranks": world.size(),
            "precision": self.accelerator.mixed_precision,
            "threads": torch.get_num_threads(),
        }

    def save(self, checkpoints: Path, keep: int) -> Path:
        """Write `step_N`; every rank must call, the main one writes. Older ones beyond `keep` are
        deleted.
        """
        device = self.accelerator.device
        mine = {"rng": checkpoint.random_state(device), "feed": self.feed.state_dict()}
        ranks = [json.loads(data) for data in world.gather_bytes(json.dumps(mine).encode(), device)]
        folder = checkpoint.step_folder(checkpoints, self.progress.step)
        moments, rest = checkpoint.split_optimizer(self.optimizer.state_dict())
        main = self.accelerator.is_main_process
        weights, moments = (
            sharded.gathered(each, keep=main) for each in (self.model.state_dict(), moments)
        )
        if self.accelerator.is_main_process:
            memory = self.objective.state_dict() if isinstance(self.objective, nn.Module) else {}
            scaler = self.accelerator.scaler
            state = {
                "progress": self.progress.state_dict(),
                "optimizer": rest,
                "scheduler": self.scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "ranks": ranks,
                "config": {**self.config, "launch": self.launch},
                "data": self.fingerprint,
            }
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
        world.barrier()
        return folder

    def load(self, folder: Path) -> None:
        """Put everything back; the folder was verified.

        Raises:
            CheckpointError: it belongs to another run, or to other shards.
        """
        state = checkpoint.read_state(folder)
        self._refuse_another_run(folder, state)
        device = self.accelerator.device
        weights = sharded.scattered(
            checkpoint.read_tensors(folder, "model"), self.model.state_dict()
        )
        try:
            missing = self.model.load_state_dict(weights, strict=False)
        except RuntimeError as error:
            # of another size
            raise CheckpointError(
                f"{folder}: holds another model ({str(error).splitlines()[-1].strip()})"
            ) from None
        if missing.missing_keys or missing.unexpected_keys:
            names = (missing.missing_keys + missing.unexpected_keys)[:3]
            raise CheckpointError(
                f"{folder}: holds another model (first differing weights: {', '.join(names)})"
            )
        moments = sharded.scattered_moments(
            checkpoint.read_tensors(folder, "optimizer"), self.optimizer.param_groups
        )
        self.optimizer.load_state_dict(checkpoint.joined_optimizer(moments, state["optimizer"]))
        self.scheduler.load_state_dict(state["scheduler"])
        if isinstance(self.objective, nn.Module):
            try:
                self.objective.load_state_dict(checkpoint.read_tensors(folder, "objective"))
            except RuntimeError as error:
                raise CheckpointError(
                    f"{folder}: the objective's memory does not fit its options now: {error}"
                ) from None
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress.step = state["progress"]["step"]
        self.progress.pairs = state["progress"]["pairs"]
        self._load_plan(folder)
        self._load_ranks(state["ranks"], device)

    def _load_plan(self, folder: Path) -> None:
        plan = checkpoint.read_tensors(folder, "mining")
        if self.feed.mining:
            try:
                self.feed.mining.load_state_dict(plan)
            except ValueError as error:
                raise CheckpointError(f"{folder}: {error}") from None

    def _refuse_another_run(self, folder: Path, state: dict[str, Any]) -> None:
        was = flat(state["config"])
        now = flat({**self.config, "launch": self.launch})
        # an option that is newer than the checkpoint has no say: without it things were as its
        # default has them
        known = {key for key in now | was if _known(key, was) and _known(key, now)}
        changed = {
            key: (was.get(key), now.get(key))
            for key in sorted(known)
            if was.get(key) != now.get(key)
        }
        if fixed := [
            key
            for key in changed
            if any(f"{key}.".startswith(f"{each}.") for each in FIXED + self.fixed)
        ]:
            said = "; ".join(
                f"{key} was {changed[key][0]!r}, now {changed[key][1]!r}" for key in fixed
            )
            raise CheckpointError(
                f"{folder}: another run: {said}. Change it back, or start anew with another --out"
            )
        if state["data"] != self.fingerprint:
            raise CheckpointError(
                f"{folder}: data.train or data.plan has changed since (other pairs, sizes or batches); restore it"
            )
        changed.pop("resume", None)
        if changed and self.accelerator.is_main_process:
            said = ", ".join(f"{key}: {old!r} -> {new!r}" for key, (old, new) in changed.items())
            print(f"note: resumed with changes: {said}", file=sys.stderr)

    def _load_ranks(self, ranks: list[dict[str, Any]], device: torch.device) -> None:
        rank = world.rank()
        if len(ranks) == world.size():
            checkpoint.set_random_state(ranks[rank]["rng"], device)
            self.feed.load_state_dict(ranks[rank]["feed"])
            return
        # another world size: the order of pairs does not depend on it; generators (dropout) start
        # anew, skips are kept
        set_seed(self.config["seed"] + self.progress.step * 1_000 + rank)
        if rank == 0:
            for each in ranks:
                kept = Feed.read_skips(each["feed"])
                self.feed.skips.merge(kept)
