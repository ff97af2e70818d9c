"""Precision: what `auto` takes, and what a device cannot do."""

from pathlib import Path

import pytest
import torch

from bob.cache.work import Hardware
from bob.errors import BobError
from bob.models import precision
from bob.models.device import autocast
from bob.models.precision import dtype_name, hardware_here, resolve_precision

CPU = torch.device("cpu")
HERE = hardware_here()
CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists(), reason="only Linux lists the processor's instructions")
def test_auto_takes_bf16_only_where_the_processor_has_it():
    flags = CPUINFO.read_text()
    has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    expected = torch.bfloat16 if has_bf16 else torch.float32
    assert resolve_precision("auto", HERE) == expected


def test_a_precision_that_is_asked_for_is_taken():
    assert resolve_precision("bf16", HERE) == torch.bfloat16
    assert resolve_precision("fp32", HERE) == torch.float32
    assert dtype_name(torch.bfloat16) == "bf16"
    with pytest.raises(BobError, match="fp16 needs a GPU"):
        resolve_precision("fp16", Hardware("cpu", bf16=True))


def test_autocast_multiplies_in_the_precision_and_fp32_is_left_alone():
    a = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize(
    ("headers", "compiler", "variable", "compiles"),
    [
        (True, "g++", None, True),
        (False, "g++", None, False),
        (True, "clang++", None, False),
        (True, "clang++", "clang++", True),
        (True, "g++", "not-there", False),
    ],
)
def test_a_machine_compiles_with_a_compiler_and_headers(
    headers, compiler, variable, compiles, monkeypatch, tmp_path
):
    if headers:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(precision.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(precision.sys, "platform", "linux")
    monkeypatch.setattr(precision.shutil, "which", lambda name: name if name == compiler else None)
    monkeypatch.delenv("CXX", raising=False)
    if variable:
        monkeypatch.setenv("CXX", variable)
    assert precision._can_compile("cpu") == compiles
