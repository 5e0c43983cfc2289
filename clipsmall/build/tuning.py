"""Config -> what of the towers trains: all of it, adapters, the last blocks, or nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clipsmall.config import Config
from clipsmall.model import lora
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.parameter_names import LAST, depths, place
from clipsmall.model.towers import Loaded
from clipsmall.training.state import RunState


def tune(config: Config, loaded: Loaded) -> None:
    """Put adapters into the towers, unless a checkpoint brought them, and say which parameters
    train.

    Raises:
        ValueError: adapters asked of our small towers, or matching nothing; more blocks than a
            tower has.
    """
    if "lora" in (config.tune.image, config.tune.text) and "lora" not in loaded.description:
        adapt(config, loaded)
    amounts = {"image": config.tune.image, "text": config.tune.text}
    blocks = depths(name for name, _ in loaded.towers.named_parameters())
    for tower, amount in amounts.items():
        if isinstance(amount, int) and amount > blocks[tower]:
            raise ValueError(
                f"tune.{tower}={amount}: the {tower} tower has {blocks[tower]} blocks; take full or fewer"
            )
    others = []
    for name, parameter in loaded.towers.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            parameter.requires_grad_(trains(config, name, blocks))
            others += [name] if parameter.requires_grad else []
    if "lora" in loaded.description:
        # what trains beside the adapters: an export must not lose it
        loaded.description["lora"]["others"] = others


def trains(config: Config, name: str, blocks: dict[str, int]) -> bool:
    """Whether a parameter of a tower, which is no adapter's, trains."""
    here = place(name)
    amount = config.tune.image if here.tower == "image" else config.tune.text
    if here.projection and config.tune.projections != "auto":
        return config.tune.projections
    if isinstance(amount, int):
        return here.block >= blocks[here.tower] - amount
    return amount == "full"


def adapt(config: Config, loaded: Loaded) -> None:
    if loaded.description["kind"] == "small":
        raise ValueError(
            f"tune: lora is for HF and open_clip towers, {config.model.name} is ours; train it full"
        )
    options = config.tune.lora.model_dump()
    asked = {tower for tower in ("image", "text") if getattr(config.tune, tower) == "lora"}
    names = [
        name
        for name in lora.targets(loaded.towers.model, options.pop("targets"))
        if place(f"{name}.").tower in asked
    ]
    if missed := asked - {place(f"{name}.").tower for name in names}:
        tower = min(missed)
        raise ValueError(
            f"tune.lora.targets={config.tune.lora.targets!r} matches nothing in the {tower} tower; give targets "
            f"for it, or tune.{tower}=frozen"
        )
    lora.insert(loaded.towers.model, names, options)
    loaded.description["lora"] = {"targets": names, "options": options}


def lean(config: Config, loaded: Loaded) -> None:
    """The kind of attention that is asked for.

    Raises:
        ValueError: towers that know only one.
    """
    if config.model.attention == "auto":
        return
    if loaded.description["kind"] == "transformers":
        loaded.towers.model.set_attn_implementation(config.model.attention)
    elif config.model.attention == "eager":
        raise ValueError(
            f"model.attention=eager: {config.model.name} computes attention by SDPA only; take auto"
        )


def checkpoint_activations(loaded: Loaded) -> None:
    """Each block's activations are dropped, and made again when its gradient is asked for.

    Raises:
        ValueError: towers that cannot; chunks do the same for any.
    """
    if loaded.description["kind"] == "transformers":
        # transformers 5.23 renamed it
        model = loaded.towers.model
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    elif loaded.description["kind"] == "open_clip":
        loaded.towers.model.set_grad_checkpointing(True)
    else:
        raise ValueError(
            "model.checkpoint_activations: our small towers have none; take model.chunk_size"
        )


def lr_scale(config: Config, model: DualEncoder) -> Callable[[str], float]:
    """Name of a parameter -> its lr over optim.lr: `layer_decay` for each block that follows
    (ELECTRA, arXiv 2003.10555, §A; BEiT, arXiv 2106.08254, §A)."""
    blocks = depths(name for name, _ in model.towers.named_parameters())

    def scale(name: str) -> float:
        here = place(name)
        if config.optim.layer_decay == 1 or not name.startswith("towers.") or here.block == LAST:
            return 1.0
        return config.optim.layer_decay ** (blocks[here.tower] - here.block)

    return scale


def refuse_idle(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make the first step fail if a parameter that trains got no gradient: it would stay as it is
    for the whole run.
    """

    def look(*_: Any) -> None:
        handle.remove()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if idle := [name for name, p in named.items() if p.grad is None]:
            raise ValueError(
                f"{len(idle)} of {len(named)} tensors that train got no gradient: {', '.join(idle[:3])} …; freeze them "
                "(see tune; adapters: narrow tune.lora.targets), or take an objective that reaches them"
            )

    handle = optimizer.register_step_pre_hook(look)


def table(model: DualEncoder) -> list[str]:
    """What trains, a line each: part, trained and all parameters."""
    counts: dict[str, list[int]] = {"image tower": [0, 0, 0], "text tower": [0, 0, 0]}
    for name, parameter in model.named_parameters():
        if not name.startswith("towers."):
            part = name.split(".")[1] if name.startswith("heads.") else name
        else:
            part = f"{place(name).tower} tower"
        trained = parameter.numel() if parameter.requires_grad else 0
        adapter = trained if ".lora_" in name else 0
        counts[part] = [
            a + b
            for a, b in zip(
                counts.get(part, [0, 0, 0]), (trained, adapter, parameter.numel()), strict=True
            )
        ]
    lines = []
    for part, (trained, adapter, total) in counts.items():
        mode = (
            "frozen"
            if not trained
            else "adapters"
            if adapter == trained
            else "all"
            if trained == total
            else "part"
        )
        lines.append(f"  {part:<12} {mode:<9} {trained:>12,} of {total:,}")
    return lines


def means(state: RunState) -> str:
    """How it is computed, in words: precision, attention, activations, optimizer."""
    accelerator = state.accelerator
    loaded = state.loaded
    precision = {"no": "fp32", "fp16": "fp16 with a loss scale"}.get(
        accelerator.mixed_precision, accelerator.mixed_precision
    )
    kind = (
        loaded.towers.model.config._attn_implementation
        if loaded.description["kind"] == "transformers"
        else "sdpa"
    )
    anew = ", blocks' activations made anew" if loaded.checkpointed else ""
    fused = "fused " if state.optimizer.param_groups[0].get("fused") else ""
    return f"{precision} on {accelerator.device.type}, attention by {kind}{anew}, {fused}AdamW"
