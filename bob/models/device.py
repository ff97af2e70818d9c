"""Which device computes, and in which precision."""

from contextlib import AbstractContextManager, nullcontext

import torch

from bob.errors import BobError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for a `precision` parameter.

    `auto` is bf16 where the hardware multiplies in it and fp32 elsewhere: emulated bf16 is four
    times slower than fp32 on a CPU without the instructions.

    Raises BobError for a precision that the device does not compute in.
    """
    if precision == "auto":
        return torch.bfloat16 if _has_bf16(device) else torch.float32
    if precision == "fp16" and device.type == "cpu":
        raise BobError("precision: fp16 needs a GPU; use auto, bf16 or fp32 on the CPU")
    return _DTYPES[precision]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Underscored, but the one place torch tells it: get_cpu_capability() stops at AVX512.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
