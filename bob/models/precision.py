"""In which precision items are computed: that of the hardware that makes them."""

import importlib.util
import os
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path

import torch

from bob.cache.executors.chosen import executor
from bob.cache.work import Hardware
from bob.errors import BobError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def hardware_here() -> Hardware:
    """What this machine computes with."""
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", bf16, torch.cuda.get_device_name(), _can_compile("cuda"))
    # Underscored, but the one place torch tells it: get_cpu_capability() stops at AVX512.
    bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return Hardware("cpu", bf16, compiles=_can_compile("cpu"))


def _can_compile(device: str) -> bool:
    """Whether torch.compile finds what it calls: compiler, Python's headers, on a GPU Triton.

    By the rules of torch 2.14 (torch/_inductor/config.py), which takes seconds to import.
    """
    if device == "cuda":
        if torch.cuda.get_device_capability() < (7, 0) or not importlib.util.find_spec("triton"):
            return False
        compilers = [os.environ.get("CC", "gcc"), "clang"]
    else:
        compilers = [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return headers.is_file() and any(map(shutil.which, compilers))


@cache
def hardware() -> Hardware:
    """What items are made on, here or elsewhere."""
    return executor().hardware(hardware_here)


def device_name() -> str:
    """What items are made on: the GPU as torch calls it, or cpu."""
    made_on = hardware()
    return made_on.name or made_on.device


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


def dtype_name(dtype: torch.dtype) -> str:
    """The name a `precision` parameter has for `dtype`: bf16, fp16 or fp32."""
    return next(name for name, known in _DTYPES.items() if known == dtype)
