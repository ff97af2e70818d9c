"""Which device computes, and in which precision."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from bob.cache import gpu_locks
from bob.cache.executors.chosen import executor
from bob.cache.work import Hardware
from bob.errors import BobError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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


def hardware_here() -> Hardware:
    """What this machine computes with."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", bf16, torch.cuda.get_device_name())
    # Underscored, but the one place torch tells it: get_cpu_capability() stops at AVX512.
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Hardware("cpu", bf16)


@cache
def hardware() -> Hardware:
    """What items are made on, here or elsewhere."""
    return executor().hardware(hardware_here)


def resolve_precision(precision: str, on: Hardware | None = None) -> torch.dtype:
    """The dtype of matrix products for a `precision` parameter, by default where items are made.

    `auto` is bf16 where the hardware multiplies in it and fp32 elsewhere: emulated bf16 is four
    times slower than fp32 on a CPU without the instructions.

    Raises BobError for a precision that the hardware does not compute in.
    """
    on = on or hardware()
    if precision == "auto":
        if on.bf16 is None:
            raise BobError(
                "precision: auto is bf16 on some machines of the cluster and fp32 on others; set it"
            )
        return torch.bfloat16 if on.bf16 else torch.float32
    if precision == "fp16" and on.device == "cpu":
        raise BobError("precision: fp16 needs a GPU; use auto, bf16 or fp32 on the CPU")
    return _DTYPES[precision]


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


def dtype_name(dtype: torch.dtype) -> str:
    """The name a `precision` parameter has for `dtype`: bf16, fp16 or fp32."""
    return next(name for name, known in _DTYPES.items() if known == dtype)
