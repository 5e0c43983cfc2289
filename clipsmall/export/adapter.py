"""Exports LoRA adapters without their base, in peft's format, with the logit scale in its own file.

peft does not save the logit scale, as it is not part of an adapter.
"""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipsmall.export.weights import Tensors
from clipsmall.model.towers import Loaded


def base_name(loaded: Loaded, name: str, public: bool) -> str:
    """The base model's name in its library.

    Args:
        name: the model's name, for messages.
        public: whether others must be able to load it, so that it may not be a local folder.

    Raises:
        ValueError: no adapters, a base that others do not have, or trained weights outside the
            adapters.
    """
    description = loaded.description
    if "lora" not in description:
        raise ValueError(
            f"{name}: was trained without LoRA, there is no adapter; leave --adapter out"
        )
    others = description["lora"].get("others")
    if others:
        raise ValueError(
            f"{name}: {len(others)} tensors beside the adapters were trained ({others[0]} …) and "
            "would be lost; leave --adapter out: the merged model has them"
        )
    base = description.get("base")
    if not base:
        raise ValueError(
            f"{name}: its base had fresh weights, which nobody else has; leave --adapter out"
        )
    if public and Path(base).exists():
        raise ValueError(
            f"{name}: its base is a folder of this machine, which nobody else can load; leave "
            "--adapter out"
        )
    return loaded.towers.name_in_library(base)


def write_adapter(
    config: dict[str, Any],
    tensors: Tensors,
    base: str,
    revision: str,
    scalars: Tensors,
    folder: Path,
) -> None:
    """Write adapter_config.json, adapter_model.safetensors and scale.json.

    Args:
        config: peft's adapter config, without the base.
        tensors: the adapters' weights under peft's names.
        base: the base model's name in its library.
        revision: the base's revision on the hub, "" if unknown.
        scalars: logit_scale (its log) and perhaps logit_bias.
    """
    # peft looks here for the base that the adapters are for
    named = {**config, "base_model_name_or_path": base, "revision": revision or None}
    (folder / "adapter_config.json").write_text(json.dumps(named, indent=2) + "\n")
    path = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    # safetensors writes with mode 0600
    path.chmod(0o644)
    log = scalars["logit_scale"].item()
    bias = scalars.get("logit_bias")
    # both the log, which libraries store, and the factor, which people expect
    scale = {
        "logit_scale": math.exp(log),
        "log_logit_scale": log,
        "logit_bias": None if bias is None else bias.item(),
    }
    (folder / "scale.json").write_text(json.dumps(scale, indent=2) + "\n")


def adapter_note(scalars: Tensors, family: str) -> str:
    """A note for the model card: what the folder holds, and what must be set by hand."""
    note = (
        "These are LoRA weights alone: they need their base, and the logit scale that stands in "
        "scale.json."
    )
    if family == "siglip" or "logit_bias" not in scalars:
        return note
    bias = scalars["logit_bias"].item()
    return f"{note} A CLIP has no logit_bias: add {bias:.6g} to its logits before a sigmoid."
