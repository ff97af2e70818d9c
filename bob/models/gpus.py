"""GPUs as their makers' data sheets describe them."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bob.errors import BobError
from bob.formats.files import read_json

UTILISATION = 0.35
"""Share of the peak that is assumed of work that was not measured on a GPU: a common figure for
networks that nobody has tuned for one. What is measured on yours may be half or twice that."""
RESULTS = Path("bench/results")
"""In a project: what `make gpu-check` measured, a file for each GPU."""


@dataclass(frozen=True)
class Gpu:
    """A model of GPU."""

    name: str
    half: float
    """Peak in TFLOP/s of dense products in fp16 (and bf16, where it has that), summed in fp32."""
    single: float
    """Peak in TFLOP/s in fp32, outside tensor cores. Convolutions, which torch computes in TF32 by
    default, can exceed it."""
    memory: int
    """Bytes."""
    called: str
    """In the name that torch gives of the device, a regular expression."""
    bf16: bool = True
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict, compare=False)
    """Of the peak, as measured: by kind of work, then by precision."""
    measured: str = field(default="", compare=False)
    """On what and when, and in which file that stands; empty where the shares are not known."""

    def precision(self, setting: str) -> str:
        """What `resolve_precision` makes of a `precision` parameter on this GPU."""
        if setting != "auto":
            return setting
        return "bf16" if self.bf16 else "fp32"

    def peak(self, precision: str) -> float:
        """In TFLOP/s."""
        return self.single if precision == "fp32" else self.half

    def seconds(self, flops: float, precision: str, work: str = "") -> float:
        """How long products of so many FLOPs take, at the share measured of `work` or UTILISATION.

        Kinds of work are finetune, generate, classify and classify_clip.
        """
        share = self.shares.get(work, {}).get(precision, UTILISATION)
        return flops / (self.peak(precision) * 1e12 * share)


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

    With the shares that were measured on such a one, if any. Raises BobError for a name that is not
    in the table, and for a file of RESULTS that is none.
    """
    return as_measured(_chosen(name))


def _chosen(name: str | None) -> Gpu:
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


def as_measured(gpu: Gpu) -> Gpu:
    """The GPU with the shares in the newest of RESULTS that is of such a one; else as it is."""
    results = [(path, _read_result(path)) for path in sorted(RESULTS.glob("*.json"))]
    of_it = [pair for pair in results if recognise(pair[1]["gpu"]) == gpu]
    if not of_it:
        return gpu
    path, newest = max(of_it, key=lambda pair: pair[1]["date"])
    source = f"{newest['gpu']}, {newest['date']}, {path.as_posix()}"
    return replace(gpu, shares=newest["shares"], measured=source if newest["shares"] else "")


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json(path)
    try:
        names = result["gpu"], result["date"]
        shares = [share for kind in result["shares"].values() for share in kind.values()]
        if not all(isinstance(name, str) for name in names):
            raise ValueError
        if not all(isinstance(share, float) and 0 < share < float("inf") for share in shares):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BobError(
            f"{path} is no result of `make gpu-check`; remove it or measure again"
        ) from None
    return result


def recognise(device: str) -> Gpu | None:
    """The GPU that torch calls `device`, as in "NVIDIA A100-SXM4-80GB"; None for another."""
    return next((gpu for gpu in _TABLE if re.search(rf"\b{gpu.called}", device)), None)
