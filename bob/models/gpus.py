"""GPUs as their makers' data sheets describe them."""

import difflib
import re
from dataclasses import dataclass

from bob.errors import BobError

UTILISATION = 0.35
"""Share of the peak that training and sampling are taken to reach: a common figure for networks
that nobody has tuned for one GPU. What is measured on yours may be half or twice that."""


@dataclass(frozen=True)
class Gpu:
    """A model of GPU."""

    name: str
    half: float
    """Peak in TFLOP/s of dense products in fp16 (and bf16, where it has that), summed in fp32."""
    single: float
    """Peak in TFLOP/s in fp32, outside tensor cores, as torch computes by default."""
    memory: int
    """Bytes."""
    called: str
    """In the name that torch gives of the device, a regular expression."""
    bf16: bool = True

    def precision(self, setting: str) -> str:
        """What `resolve_precision` makes of a `precision` parameter on this GPU."""
        if setting != "auto":
            return setting
        return "bf16" if self.bf16 else "fp32"

    def seconds(self, flops: float, precision: str) -> float:
        """How long products of so many FLOPs take at UTILISATION."""
        teraflops = self.single if precision == "fp32" else self.half
        return flops / (teraflops * 1e12 * UTILISATION)


# None before Turing: the builds of torch for CUDA 13 have no kernels for them.
_TABLE = (
    Gpu("h100", 989, 67, 80 * 10**9, "H100"),  # SXM
    Gpu("h200", 989, 67, 141 * 10**9, "H200"),  # SXM
    Gpu("a100-80gb", 312, 19.5, 80 * 10**9, "A100.*80GB"),
    Gpu("a100", 312, 19.5, 40 * 10**9, "A100"),
    Gpu("l40s", 362, 91.6, 48 * 10**9, "L40S"),
    Gpu("l4", 121, 30.3, 24 * 10**9, r"L4\b"),
    Gpu("a10g", 70, 35, 24 * 10**9, "A10G"),
    Gpu("rtx4090", 165.2, 82.6, 24 * 10**9, "RTX 4090"),
    Gpu("rtx3090", 71, 35.6, 24 * 10**9, "RTX 3090"),
    Gpu("t4", 65, 8.1, 16 * 10**9, r"T4\b", bf16=False),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}
DEFAULT = "h100"


def choose(name: str | None) -> Gpu:
    """The GPU called `name`; without a name that which makes the items, or else DEFAULT.

    Raises BobError for a name that is not in the table.
    """
    if name is None:
        from bob.models.precision import (
            hardware,
        )  # late: torch; a plan with nothing to do needs none

        return recognise(hardware().name) or GPUS[DEFAULT]
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    near = difflib.get_close_matches(name.lower(), GPUS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(GPUS)}"
    raise BobError(f"--gpu {name} is not in the table of GPUs; {hint}")


def recognise(device: str) -> Gpu | None:
    """The GPU that torch calls `device`, as in "NVIDIA A100-SXM4-80GB"; None for another."""
    return next((gpu for gpu in _TABLE if re.search(rf"\b{gpu.called}", device)), None)
