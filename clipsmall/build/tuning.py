"""Which parts of the towers train: everything, adapters, the last blocks, or nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from clipsmall.config.schema import TuneSection
from clipsmall.model import lora
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.parameter_names import LAST, Location, depths
from clipsmall.model.towers import Loaded, Towers
from clipsmall.training.state import RunState


def tune(options: TuneSection, loaded: Loaded) -> None:
    """Insert adapters, unless a checkpoint has them already, and set which parameters train.

    Raises:
        ValueError: the towers do not support adapters, the targets match nothing, or a tower has
            fewer blocks than the config names.
    """
    towers = loaded.towers
    # the towers of a resumed checkpoint have them already
    if "lora" in (options.image, options.text) and "lora" not in loaded.description:
        insert_adapters(options, loaded)
    blocks = block_counts(towers)
    for tower, amount in {"image": options.image, "text": options.text}.items():
        if isinstance(amount, int) and amount > blocks[tower]:
            raise ValueError(
                f"tune.{tower}={amount}: the {tower} tower has {blocks[tower]} blocks; take full "
                "or fewer"
            )
    trained = []
    for name, parameter in towers.named_parameters():
        # adapters always train; parameters that the library froze never do
        if not parameter.requires_grad or ".lora_" in name:
            continue
        parameter.requires_grad_(trains(options, towers.locate(name), blocks))
        if parameter.requires_grad:
            trained.append(name)
    if "lora" in loaded.description:
        # what trains besides the adapters; an export of only the adapters would lose it
        loaded.description["lora"]["others"] = trained


def block_counts(towers: Towers) -> dict[str, int]:
    """How many blocks the image tower and the text tower have."""
    return depths(towers.locate(name) for name, _ in towers.named_parameters())


def trains(options: TuneSection, where: Location, blocks: dict[str, int]) -> bool:
    """Whether a tower parameter that does not belong to an adapter trains.

    Args:
        where: location of the parameter.
        blocks: number of blocks of each tower.
    """
    amount = options.image if where.tower == "image" else options.text
    # a projection trains with its tower, unless the config says otherwise
    if where.projection and options.projections != "auto":
        return options.projections
    if isinstance(amount, int):
        return where.block >= blocks[where.tower] - amount
    return amount == "full"


def insert_adapters(options: TuneSection, loaded: Loaded) -> None:
    """Insert adapters into the towers set to `lora`, and record them for the checkpoint.

    Raises:
        ValueError: these towers do not support adapters, or the targets match no module of a tower.
    """
    towers = loaded.towers
    if towers.why_no_lora:
        raise ValueError(f"tune: {towers.why_no_lora}")
    asked = {tower for tower in ("image", "text") if getattr(options, tower) == "lora"}
    matched = set()
    names = []
    # the targets may match modules of both towers, though only one may be set to lora
    for name in lora.targets(towers.adaptable, options.lora.targets, towers.locate):
        tower = towers.locate(f"{name}.").tower
        if tower in asked:
            names.append(name)
            matched.add(tower)
    if asked - matched:
        tower = min(asked - matched)
        raise ValueError(
            f"tune.lora.targets={options.lora.targets!r} matches nothing in the {tower} tower; "
            f"give targets for it, or tune.{tower}=frozen"
        )
    adapters = options.lora.model_dump(exclude={"targets"})
    lora.insert(towers.adaptable, names, adapters)
    loaded.description["lora"] = {"targets": names, "options": adapters}


def lr_scale(layer_decay: float, model: DualEncoder) -> Callable[[str], float]:
    """A function from a parameter's name to the factor of its learning rate.

    A block's rate is `layer_decay` times that of the block after it (ELECTRA, arXiv 2003.10555,
    §A; BEiT, arXiv 2106.08254, §A). Parameters after the blocks or outside the towers have 1.
    """
    towers: Towers = model.towers
    blocks = block_counts(towers)

    def scale(name: str) -> float:
        if layer_decay == 1 or not name.startswith("towers."):
            return 1.0
        here = towers.locate(name.removeprefix("towers."))
        if here.block == LAST:
            return 1.0
        return layer_decay ** (blocks[here.tower] - here.block)

    return scale


def refuse_idle(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make the first step fail if a trainable parameter got no gradient.

    Such a parameter would not change during the whole run.
    """

    def look(*_: Any) -> None:
        # check the first step only
        handle.remove()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        idle = [name for name, p in trained.items() if p.grad is None]
        if idle:
            raise ValueError(
                f"{len(idle)} of {len(trained)} trainable tensors got no gradient: "
                f"{', '.join(idle[:3])} …; freeze them (see tune; adapters: narrow "
                "tune.lora.targets), or choose an objective that uses them"
            )

    handle = optimizer.register_step_pre_hook(look)


def trained_parts(model: DualEncoder) -> list[str]:
    """One line per part of the model: whether it trains, and how many parameters."""
    # list the towers first, whatever the order of the parameters
    trained = {"image tower": 0, "text tower": 0}
    adapters = dict(trained)
    total = dict(trained)
    for name, parameter in model.named_parameters():
        part = _part(model.towers, name)
        if part not in total:
            trained[part] = 0
            adapters[part] = 0
            total[part] = 0
        size = parameter.numel()
        total[part] += size
        if parameter.requires_grad:
            trained[part] += size
            if ".lora_" in name:
                adapters[part] += size
    lines = []
    for part in total:
        mode = _mode(trained[part], adapters[part], total[part])
        lines.append(f"  {part:<12} {mode:<9} {trained[part]:>12,} of {total[part]:,}")
    return lines


def _part(towers: Towers, name: str) -> str:
    """The part of the model that a parameter belongs to: a tower, a head, scale or bias."""
    if name.startswith("towers."):
        return f"{towers.locate(name.removeprefix('towers.')).tower} tower"
    if name.startswith("heads."):
        return name.split(".")[1]
    return name


def _mode(trained: int, adapters: int, total: int) -> str:
    if not trained:
        return "frozen"
    if adapters == trained:
        return "adapters"
    return "all" if trained == total else "part"


def computation(state: RunState) -> str:
    """A line on how the model is computed: precision, attention, checkpointing, optimizer."""
    accelerator = state.accelerator
    precision = accelerator.mixed_precision
    if precision == "no":
        precision = "fp32"
    elif precision == "fp16":
        precision = "fp16 with a loss scale"
    attention = f"attention by {state.loaded.towers.attention}"
    if state.loaded.checkpointed:
        attention += ", activation checkpointing"
    fused = "fused " if state.optimizer.param_groups[0].get("fused") else ""
    return f"{precision} on {accelerator.device.type}, {attention}, {fused}AdamW"
