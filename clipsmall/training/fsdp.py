"""Towers too large for one card: weights, gradients and moments shared out over ranks.

FSDP (Zhao et al. 2023, arXiv 2304.11277), torch's second version: ZeRO 3 (arXiv 1910.02054, §5)
with DTensors.
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
# what Accelerate offers beside, by the names under which `accelerate launch` hands it on, and what
# to do instead
OTHERS = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params: weights stay on the cards; take more ranks",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "fsdp_cpu_ram_efficient_loading: every rank loads the weights",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing: set model.checkpoint_activations instead",
}


def asked() -> bool:
    """Whether the launcher asks for FSDP. (On CPU ranks Accelerate itself would not hear it.)"""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def check(precision: str, chunk_size: int | str) -> None:
    """Raises ValueError for what does not go with sharded towers."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError(
            "fsdp_version: 1 wraps models in its own way; set fsdp_version: 2, as launch/fsdp.yaml does"
        )
    for name, words in OTHERS.items():
        if parse_flag_from_env(name):
            raise ValueError(f"{words} ({name} must be false)")
    if precision == "fp16":
        raise ValueError(
            "run.precision=fp16: GradScaler does not take sharded gradients beside whole ones; use bf16"
        )
    if chunk_size == "auto":
        raise ValueError(
            "model.chunk_size=auto tries what fits, which ranks with sharded towers cannot; give a number"
        )


def shard(model: DualEncoder, device: torch.device) -> None:
    """Towers, and averaged ones, are sharded block by block: a rank holds 1/W of them, and a block
    for its pass.

    What else trains stays whole on every rank: scale, bias, heads. Call before the optimizer is
    made: parameters become other objects.

    Raises:
        ValueError: adapters in an attention module of torch's, as open_clip has them: peft takes
            its weights out.
    """
    if world.size() == 1:
        return
    for name, part in model.towers.named_modules():
        if isinstance(part, nn.MultiheadAttention) and name.endswith(".base_layer"):
            raise ValueError(
                f"tune.lora.targets: {name.removesuffix('.base_layer')} hides its weights from FSDP behind adapters; "
                "name the other linear maps (tune.lora.targets=[c_fc, c_proj]), or train the HF model of that name"
            )
    averages = [part.towers for part in model.heads.modules() if isinstance(part, MovingAverage)]
    for towers in [model.towers, *averages]:
        blocks = [part for name, part in towers.named_modules() if is_block(name)]
        world.shard_parameters([*blocks, towers], ("image", "text"), device)
    for parameter in model.parameters():
        if parameter.requires_grad and share(parameter) is parameter:
            parameter.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]


def is_block(name: str) -> bool:
    """Whether a module of towers is a block, and no part of one."""
    found = BLOCK.search(f".{name}.")
    return found is not None and found.end() == len(name) + 2


def _average(parameter: Tensor) -> None:
    """As DDP and FSDP do it."""
    assert parameter.grad is not None
    parameter.grad = world.mean_over_ranks(parameter.grad)


def share(x: Any) -> Tensor:
    """My share of a sharded tensor, in its own memory; any other tensor as it is."""
    mine: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return mine


def whole(x: Any) -> Tensor:
    """A sharded tensor put together, on every rank; any other as it is."""
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


def gathered(tensors: Tensors, keep: bool) -> Tensors:
    """Whole tensors, put together one by one; all ranks must call, those that `keep` get them, in
    host memory.
    """
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if keep:
            found[name] = full if full is tensor else full.cpu()
    return found


def scattered(tensors: Tensors, like: Tensors) -> Tensors:
    """Whole tensors, the same on every rank, sharded as those of the same name in `like` are."""
    return {name: world.shard_like(like.get(name), tensor) for name, tensor in tensors.items()}


def scattered_moments(moments: Tensors, groups: list[dict[str, Any]]) -> Tensors:
    """The same for `checkpoint.split_optimizer`'s: each as its parameter is, its count of steps as
    it was.
    """
    parameters: list[nn.Parameter] = [
        parameter for group in groups for parameter in group["params"]
    ]
    found = {}
    for name, tensor in moments.items():
        parameter = parameters[int(name.partition(".")[0])]
        found[name] = world.shard_like(parameter, tensor) if tensor.ndim else tensor
    return found


def told(model: nn.Module) -> str:
    """In words, for the opening lines; nothing if nothing is sharded."""
    parameters = list(model.parameters())
    mine = sum(share(parameter).numel() for parameter in parameters)
    total = sum(parameter.numel() for parameter in parameters)
    return (
        f", {mine / 1e6:.2f}M of {total / 1e6:.2f}M weights on each (FSDP)" if mine < total else ""
    )
