"""FSDP for towers too large for one GPU: shards weights, gradients and moments over the ranks.

FSDP (Zhao et al. 2023, arXiv 2304.11277) in torch's second version, fully_shard: ZeRO stage 3
(arXiv 1910.02054, §5) with DTensors.
"""

import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from clipsmall.distributed import world
from clipsmall.model.dual_encoder import DualEncoder
from clipsmall.model.momentum import MovingAverage
from clipsmall.model.parameter_names import BLOCK

Tensors = dict[str, Tensor]
# FSDP options of Accelerate that are not supported here: what to do instead, by the environment
# variable in which `accelerate launch` passes the option
UNSUPPORTED = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: weights stay on the GPUs; take more ranks",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "fsdp_cpu_ram_efficient_loading: every rank loads the weights"
    ),
    "FSDP_ACTIVATION_CHECKPOINTING": (
        "fsdp_activation_checkpointing: set model.checkpoint_activations instead"
    ),
}


def asked() -> bool:
    """Whether the launcher asks for FSDP; also true on CPU ranks, where Accelerate ignores it."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check_settings(precision: str, chunk_size: int | str) -> None:
    """Raises ValueError for settings that do not work with sharded towers."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "fsdp_version: 1 wraps models in its own way; "
            "set fsdp_version: 2, as launch/fsdp.yaml does"
        )
    for name, words in UNSUPPORTED.items():
        if parse_flag_from_env(name):
            raise ValueError(f"{words} ({name} must be false)")
    if precision == "fp16":
        raise ValueError(
            "run.precision=fp16: GradScaler does not take sharded gradients together with whole "
            "ones; use bf16"
        )
    if chunk_size == "auto":
        raise ValueError(
            "model.chunk_size=auto tries what fits, which ranks with sharded towers cannot; "
            "give a number"
        )


def shard_towers(model: DualEncoder, device: torch.device) -> None:
    """Shard the towers, and moving averages of them, block by block.

    A rank holds 1/W of each block, and a whole block only while it is computed. Everything else
    that trains (scale, bias, heads) stays whole on every rank. Call before building the optimizer,
    because the parameters are replaced by other objects.

    Raises:
        ValueError: adapters in torch's own attention module, which open_clip uses: peft moves its
            weights to where FSDP does not find them.
    """
    if world.size() == 1:
        return
    for name, part in model.towers.named_modules():
        if isinstance(part, nn.MultiheadAttention) and name.endswith(".base_layer"):
            raise ValueError(
                f"tune.lora.targets: {name.removesuffix('.base_layer')} hides its weights from "
                "FSDP behind adapters; name the other linear maps "
                "(tune.lora.targets=[c_fc, c_proj]), or train the HF model of that name"
            )
    averages = [part.towers for part in model.heads.modules() if isinstance(part, MovingAverage)]
    for towers in [model.towers, *averages]:
        blocks = [part for name, part in towers.named_modules() if is_block(name)]
        world.shard_parameters([*blocks, towers], ("image", "text"), device)
    # without DDP, the gradients of parameters that stay whole must be averaged here
    for parameter in model.parameters():
        whole = local_part(parameter) is parameter
        if whole and parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                _average_gradient
            )


def is_block(name: str) -> bool:
    """Whether a module of the towers is itself a block, not a part of one."""
    found = BLOCK.search(f".{name}.")
    return found is not None and found.end() == len(name) + 2


def _average_gradient(parameter: Tensor) -> None:
    """Average a gradient over ranks, as DDP and FSDP do."""
    assert parameter.grad is not None
    parameter.grad = world.mean_over_ranks(parameter.grad)


def local_part(x: Any) -> Tensor:
    """This rank's part of a sharded tensor (sharing memory); any other tensor unchanged."""
    mine: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return mine


def full_tensor(x: Any) -> Tensor:
    """The whole of a sharded tensor, on every rank; any other tensor unchanged."""
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


def gathered(tensors: Tensors, keep: bool) -> Tensors:
    """Gather sharded tensors one by one into host memory. All ranks must call.

    Args:
        keep: whether this rank keeps them; otherwise it returns an empty dict.
    """
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor)
        if keep:
            found[name] = full if full is tensor else full.cpu()
    return found


def scattered(tensors: Tensors, like: Tensors) -> Tensors:
    """Shard whole tensors, equal on all ranks, like the tensors of the same names in `like`."""
    return {name: world.shard_like(like.get(name), tensor) for name, tensor in tensors.items()}


def scattered_moments(moments: Tensors, groups: list[dict[str, Any]]) -> Tensors:
    """Shard an optimizer's whole moments, each like its parameter.

    Args:
        moments: as `checkpoint.split_optimizer` names them, `0.exp_avg` for the first parameter.
        groups: the optimizer's parameter groups.
    """
    parameters: list[nn.Parameter] = []
    for group in groups:
        parameters += group["params"]
    found = {}
    for name, tensor in moments.items():
        parameter = parameters[int(name.partition(".")[0])]
        # the step count is a scalar, the same on every rank
        found[name] = world.shard_like(parameter, tensor) if tensor.ndim else tensor
    return found


def sharding_description(model: nn.Module) -> str:
    """A phrase on sharding for the opening lines of a run; "" if nothing is sharded."""
    parameters = list(model.parameters())
    mine = sum(local_part(parameter).numel() for parameter in parameters)
    total = sum(parameter.numel() for parameter in parameters)
    if mine == total:
        return ""
    return f", {mine / 1e6:.2f}M of {total / 1e6:.2f}M weights on each (FSDP)"
