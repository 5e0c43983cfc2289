"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in a model, by peft: put in, merged,
taken out.
"""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from clipsmall.model.parameter_names import linear_maps


def targets(model: nn.Module, asked: str | Sequence[str]) -> list[str]:
    """Full names of the modules that get adapters.

    Args:
        asked: `auto`: every linear map in a block; names, each of a module or the end of several's;
            or a regular expression, which must match a full name whole.

    Raises:
        ValueError: a name or expression that matches nothing.
    """
    if asked == "auto":
        return linear_maps(model)
    known = [
        name for name, part in model.named_modules() if name and not isinstance(part, nn.ModuleList)
    ]
    if isinstance(asked, str):
        try:
            found = [name for name in known if re.fullmatch(asked, name)]
        except re.error as error:
            raise ValueError(
                f"tune.lora.targets: {asked!r} is no regular expression ({error})"
            ) from None
        if not found:
            raise ValueError(
                f"tune.lora.targets: {asked!r} matches no module whole; there are {', '.join(linear_maps(model)[:4])} …"
            )
        return found
    for name in asked:
        if not any(f".{each}".endswith(f".{name}") for each in known):
            ends = sorted({each.rpartition(".")[2] for each in linear_maps(model)})
            near = difflib.get_close_matches(name, ends, 1)
            hint = (
                f"do you mean {near[0]!r}?"
                if near
                else f"linear maps here are named {', '.join(ends)}"
            )
            raise ValueError(f"tune.lora.targets: no module is named {name!r}; {hint}")
    return [each for each in known if any(f".{each}".endswith(f".{name}") for name in asked)]


def insert(model: nn.Module, names: Sequence[str], options: dict[str, Any]) -> None:
    """Put adapters, in place, into the named modules; they start as no change, and train. All else
    is as it was.

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
    # peft froze them
    for parameter in learned:
        parameter.requires_grad_(True)


def merge(model: nn.Module) -> None:
    """Add the adapters to the weights, in place: the modules are plain ones again, and the features
    the same.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def first() -> tuple[str, Any] | None:
        return next(
            (
                (name, part)
                for name, part in model.named_modules()
                if isinstance(part, BaseTunerLayer)
            ),
            None,
        )

    # parents come before their children, and merge them
    while found := first():
        name, part = found
        if not part.merged:
            part.merge()
        base, (parent, _, child) = part.get_base_layer(), name.rpartition(".")
        for weight in ("weight", "in_proj_weight"):
            # of an attention module peft leaves a tensor that is no parameter
            if weight in vars(base):
                setattr(base, weight, nn.Parameter(vars(base).pop(weight)))
        setattr(model.get_submodule(parent), child, base)
    if hasattr(model, "peft_config"):
        del model.peft_config


def adapter(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What peft writes: the content of adapter_config.json, and the tensors of
    adapter_model.safetensors by name.
    """
    from peft import get_peft_model_state_dict

    config: Any = model.peft_config["default"]  # type: ignore[index]
    # sets of names
    plain = json.loads(json.dumps(config.to_dict(), default=lambda each: sorted(each)))
    tensors = get_peft_model_state_dict(model)
    return plain | {"inference_mode": True}, {
        f"base_model.model.{name}": tensor for name, tensor in tensors.items()
    }
