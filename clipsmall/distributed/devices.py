"""What a device can compute: whether this PyTorch has kernels for it, and in which precision it
trains.
"""

import os
from collections.abc import Iterable

import torch

V100 = "pip install 'torch>=2.10,<=2.14' torchvision --index-url https://download.pytorch.org/whl/cu126"


def has_kernels(capability: tuple[int, int], built_for: Iterable[str]) -> bool:
    """Whether code of these architectures (`sm_80`, `compute_90`) runs on a device: machine code
    runs on later devices of the same major number, PTX (`compute_`) is compiled for any later
    one."""
    for name in built_for:
        kind, _, number = name.partition("_")
        # sm_90a
        digits = "".join(filter(str.isdigit, number))
        theirs = (int(digits[:-1]), int(digits[-1]))
        if theirs <= capability and (kind == "compute" or theirs[0] == capability[0]):
            return True
    return False


def check_kernels() -> None:
    """Raises ValueError where torch would say "no kernel image is available" in the middle of the
    first step.
    """
    if not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    built_for = torch.cuda.get_arch_list()
    if built_for and not has_kernels(capability, built_for):
        old = f"; for a V100 the last wheels are: {V100}" if capability == (7, 0) else ""
        raise ValueError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name()} (sm_{capability[0]}"
            f"{capability[1]}), only for {', '.join(built_for)}: install a build that has them{old}"
        )


def has_bf16() -> bool:
    """In hardware. Without `including_emulation` a V100 says yes, and computes at half the speed of
    float32.
    """
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def precision(asked: str) -> str | None:
    """Accelerate's `mixed_precision` for `run.precision`; None leaves it to the launcher.

    `auto`: what the launcher says; where it says nothing, bf16 on a GPU that has it, else fp16, and
    float32 on a CPU.
    """
    if asked != "auto":
        return {"fp32": "no"}.get(asked, asked)
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no" or not torch.cuda.is_available():
        return None
    return "bf16" if has_bf16() else "fp16"
