"""Which device computes, and how."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from bob.cache import gpu_locks


@cache
def computing_device() -> torch.device:
    """The device of this process: a free GPU of the machine, held until the process ends.

    The CPU where there is no GPU. Waits where none is free: to be called when something is to be
    computed, not when it is only planned.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # By what no CUDA_VISIBLE_DEVICES renumbers.
    names = [str(torch.cuda.get_device_properties(number).uuid) for number in range(count)]
    device = torch.device("cuda", gpu_locks.take_free(names))
    torch.cuda.set_device(device)
    return device


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; from pinned memory, or the copy would wait for the GPU's queue."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def device_here() -> str:
    """The device of this process: the GPU as torch calls it, or cpu."""
    device = computing_device()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to `dtype` on `device`; nothing at all for fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def fastest_layout(device: torch.device, dtype: torch.dtype) -> torch.memory_format:
    """The memory format in which a UNet computes fastest under autocast to `dtype`.

    channels_last for the convolutions; but on a CPU in bf16, group normalisation takes seven times
    as long in it, more than the convolutions gain.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        return torch.contiguous_format
    return torch.channels_last
