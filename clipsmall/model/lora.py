"""Low-rank adapters (LoRA) in a model, by peft: put in, merged, taken out.

Hu et al. 2021, arXiv 2106.09685.
"""

import difflib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from clipsmall.model.parameter_names import Location, linear_maps, locate


def targets(
    model: nn.Module, asked: str | Sequence[str], where: Callable[[str], Location] = locate
) -> list[str]:
    """Full names of the modules that get adapters.

    Args:
        asked: `auto` (every linear map in a block), module names or endings of module names, or a
            regular expression that must match the full name.
        where: returns the location of a module.

    Raises:
        ValueError: a name or expression that matches nothing.
    """
    maps = linear_maps(model, where)
    if asked == "auto":
        return maps
    known = [
        name for name, part in model.named_modules() if name and not isinstance(part, nn.ModuleList)
    ]
    if isinstance(asked, str):
        return _matched(asked, known, maps)
    for name in asked:
        if not any(_ends_with(each, name) for each in known):
            raise ValueError(
                f"tune.lora.targets: no module is named {name!r}; {_nearest(name, maps)}"
            )
    return [each for each in known if any(_ends_with(each, name) for name in asked)]


def _matched(expression: str, known: list[str], maps: list[str]) -> list[str]:
    try:
        found = [name for name in known if re.fullmatch(expression, name)]
    except re.error as error:
        raise ValueError(
            f"tune.lora.targets: {expression!r} is no regular expression ({error})"
        ) from None
    if not found:
        raise ValueError(
            f"tune.lora.targets: {expression!r} matches no module whole; there are "
            f"{', '.join(maps[:4])} …"
        )
    return found


def _ends_with(full: str, name: str) -> bool:
    """Whether `name` is the full name, or its last parts."""
    return f".{full}".endswith(f".{name}")


def _nearest(name: str, maps: list[str]) -> str:
    """A hint for a name that matches no module."""
    ends = sorted({each.rpartition(".")[2] for each in maps})
    near = difflib.get_close_matches(name, ends, 1)
    if near:
        return f"do you mean {near[0]!r}?"
    return f"linear maps here are named {', '.join(ends)}"


def insert(model: nn.Module, names: Sequence[str], options: dict[str, Any]) -> None:
    """Insert adapters into the named modules, in place.

    Adapters train, and at first do not change the outputs; everything else stays as it was.

    Args:
        options: rank, alpha, dropout, dora, rslora.

    Raises:
        ValueError: peft has no adapter for such a module, or not with these options.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        use_dora=options["dora"],
        use_rslora=options["rslora"],
        target_modules=list(names),
    )
    learned = [p for p in model.parameters() if p.requires_grad]
    try:
        inject_adapter_in_model(config, model)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"tune.lora: peft refuses these targets or options: {error}") from None
    # peft froze these parameters
    for parameter in learned:
        parameter.requires_grad_(True)


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights, in place.

    The modules are plain ones again, and the features the same.
    """
    # parents come before their children, and merge them
    adapted = _first_adapted(model)
    while adapted is not None:
        name, part = adapted
        if not part.merged:
            part.merge()
        base = part.get_base_layer()
        for weight in ("weight", "in_proj_weight"):
            # of an attention module peft leaves a tensor that is no parameter
            if weight in vars(base):
                setattr(base, weight, nn.Parameter(vars(base).pop(weight)))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
        adapted = _first_adapted(model)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _first_adapted(model: nn.Module) -> tuple[str, Any] | None:
    """Name and module of the first adapter, if there is one left."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in model.named_modules():
        if isinstance(part, BaseTunerLayer):
            return name, part
    return None


def adapter(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What peft writes of the adapters in a model.

    Returns:
        The content of adapter_config.json, and the tensors of adapter_model.safetensors by name.
    """
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config["default"]  # type: ignore[index]
    # it contains sets of names, but JSON has no sets
    plain = json.loads(json.dumps(config.to_dict(), default=lambda each: sorted(each)))
    plain["inference_mode"] = True
    tensors = get_peft_model_state_dict(model)
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    return plain, named
