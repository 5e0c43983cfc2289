"""Checkpoints: all state of a run in one folder of safetensors and JSON files, written atomically.

A folder `step_00001234` holds weights (`model.safetensors`), optimizer and schedule
(`optimizer.*`), the objective's buffers (`objective.safetensors`), and in `state.json` the position
in the data, Progress and every rank's random generators. `manifest.json` is written last, with size
and sha256 of every other file. Only then does the folder get its final name.
"""

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipsmall.storage import atomic

VERSION = 1
Tensors = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the folder and the file."""


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of all random generators of this process, as JSON."""
    cuda = ""
    if device.type == "cuda":
        cuda = _as_hex(torch.cuda.get_rng_state(device))
    # `position` holds three values: the position in the keys, and a stored Gaussian number
    kind, keys, *position = np.random.get_state(legacy=True)
    return {
        "torch": _as_hex(torch.get_rng_state()),
        "cuda": cuda,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *position],
    }


def _as_hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore all random generators of this process to a state from `random_state`."""
    torch.set_rng_state(_from_hex(state["torch"]))
    if device.type == "cuda" and state["cuda"]:
        torch.cuda.set_rng_state(_from_hex(state["cuda"]), device)
    # JSON turned the tuples into lists
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *position = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *position))


def split_optimizer(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Split `optimizer.state_dict()` into tensors by `parameter.name`, and the rest as JSON."""
    tensors = Tensors()
    rest = dict[str, dict[str, Any]]()
    for parameter, entries in state["state"].items():
        rest[str(parameter)] = {}
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value
            else:
                rest[str(parameter)][name] = value
    return tensors, {"state": rest, "param_groups": state["param_groups"]}


def joined_optimizer(tensors: Tensors, rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `split_optimizer`."""
    state = dict[int, dict[str, Any]]()
    # JSON turned the parameters' numbers into strings
    for parameter, entries in rest["state"].items():
        state[int(parameter)] = dict(entries)
    for key, value in tensors.items():
        parameter, _, name = key.partition(".")
        state[int(parameter)][name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of a step's checkpoint; the names sort by step."""
    return checkpoints / f"step_{step:08d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    folder: Path, tensors: dict[str, Tensors], state: dict[str, Any], extra: Callable[[Path], None]
) -> None:
    """Write a checkpoint folder atomically.

    Args:
        folder: final name; an existing folder of that name is replaced.
        tensors: tensors by stem of the file; no file is written for an empty dict.
        state: content of state.json.
        extra: a function that writes further files into the folder it is given.

    Raises:
        CheckpointError: the disk is full or not writable; existing checkpoints are unchanged.
    """
    try:
        with atomic.new_folder(folder, overwrite=True) as temporary:
            for stem, named in tensors.items():
                if named:
                    _save_tensors(named, temporary / f"{stem}.safetensors")
            (temporary / "state.json").write_text(json.dumps(state))
            extra(temporary)
            # written last, because it lists all other files
            _write_manifest(temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: could not be written ({error}); earlier checkpoints are complete: free "
            "some space, then continue with --resume=auto"
        ) from error


def _save_tensors(named: Tensors, path: Path) -> None:
    whole = Tensors()
    for name, tensor in named.items():
        # clone, because safetensors refuses tied weights, which share memory
        whole[name] = tensor.detach().cpu().contiguous().clone()
    save_file(whole, path)


def _write_manifest(folder: Path) -> None:
    """List size and sha256 of every file in the folder."""
    files = dict[str, dict[str, Any]]()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        size = path.stat().st_size
        name = str(path.relative_to(folder))
        files[name] = {"size": size, "sha256": _digest(path)}
    manifest = {"version": VERSION, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))


def verify(folder: Path) -> None:
    """Raises CheckpointError unless every file has the size and hash listed in the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise CheckpointError(
            f"{folder}: not a clipsmall checkpoint, or an incomplete one (no manifest.json)"
        ) from None
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{folder}: checkpoint version {manifest.get('version')}; "
            f"this clipsmall reads {VERSION}"
        )
    for name, facts in manifest["files"].items():
        path = folder / name
        # check the size first; hashing gigabytes takes a while
        whole = path.exists() and path.stat().st_size == facts["size"]
        if not whole or _digest(path) != facts["sha256"]:
            raise CheckpointError(
                f"{path}: missing, truncated or changed since it was saved; use another checkpoint"
            )


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint; None if there is no checkpoint.

    Broken checkpoints are skipped with a warning on stderr.

    Raises:
        CheckpointError: there are checkpoints, but all are broken.
    """
    there = sorted(checkpoints.glob("step_*"), reverse=True)
    for folder in there:
        try:
            verify(folder)
        except CheckpointError as error:
            print(f"warning: {error}; falling back to the previous checkpoint", file=sys.stderr)
        else:
            return folder
    if there:
        raise CheckpointError(
            f"{checkpoints}: none of {len(there)} checkpoints can be used; restore one, "
            "or give another --out"
        )
    return None


def tidy(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and files of interrupted saves."""
    atomic.sweep(checkpoints)
    for old in sorted(checkpoints.glob("step_*"))[:-keep]:
        shutil.rmtree(old)


def read_tensors(folder: Path, stem: str) -> Tensors:
    """The tensors of one file; {} if there is no such file. Raises CheckpointError."""
    path = folder / f"{stem}.safetensors"
    try:
        return load_file(path) if path.exists() else {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def read_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state
