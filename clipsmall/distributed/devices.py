"""Checks that this PyTorch has kernels for the GPU, and chooses the precision."""

import os
from collections.abc import Iterable

import torch

# the command that installs the last wheels with kernels for a V100
V100_WHEELS = (
    "pip install 'torch>=2.10,<=2.14' torchvision "
    "--index-url https://download.pytorch.org/whl/cu126"
)


def has_kernels(capability: tuple[int, int], built_for: Iterable[str]) -> bool:
    """Whether code for any of these architectures (`sm_80`, `compute_90`) runs on a device.

    Machine code (`sm_`) runs on later devices of the same major number, PTX (`compute_`) is
    compiled for any later one.
    """
    for name in built_for:
        kind, _, number = name.partition("_")

        # drop a suffix, as in sm_90a
        digits = "".join(filter(str.isdigit, number))
        built = (int(digits[:-1]), int(digits[-1]))
        same_major = built[0] == capability[0]
        if built <= capability and (kind == "compute" or same_major):
            return True

    return False


def check_kernels() -> None:
    """Raises ValueError if this PyTorch has no kernels for the GPU.

    torch itself fails only during the first step, with "no kernel image is available".
    """
    if not torch.cuda.is_available():
        return
    capability = torch.cuda.get_device_capability()
    built_for = torch.cuda.get_arch_list()
    if built_for and not has_kernels(capability, built_for):
        device = torch.cuda.get_device_name()
        architecture = f"sm_{capability[0]}{capability[1]}"
        hint = f"; for a V100 the last wheels are: {V100_WHEELS}" if capability == (7, 0) else ""
        raise ValueError(
            f"torch {torch.__version__} has no kernels for {device} ({architecture}), "
            f"only for {', '.join(built_for)}: install a build that has them{hint}"
        )


def has_bf16() -> bool:
    """Whether the GPU supports bf16 in hardware.

    Emulation does not count: on a V100, emulated bf16 runs at half the speed of float32.
    """
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def precision(asked: str) -> str | None:
    """Accelerate's `mixed_precision` for `run.precision`; None leaves it to the launcher.

    `auto` is the launcher's setting; without one, bf16 on a GPU that supports it, fp16 on any other
    GPU, and float32 on a CPU.
    """
    if asked == "fp32":
        return "no"
    if asked != "auto":
        return asked
    launcher_decides = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no"
    if launcher_decides or not torch.cuda.is_available():
        return None
    return "bf16" if has_bf16() else "fp16"
