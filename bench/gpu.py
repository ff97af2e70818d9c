"""Everything that only a GPU can show, in one command of some eight minutes; nothing is downloaded.

    make gpu-check                      # or: python -m bench.gpu
    python -m bench.gpu --tiny          # every path but the kernels, on any machine

Stable Diffusion 1.5, ResNet-50, ViT-B/16, CLIP and a small Qwen2.5-VL, with random weights. Each
section runs for itself: one that fails, or takes longer than its budget, is told, and the others go
on; one whose libraries are not installed is skipped. Exits with status 1 where something failed or
is not as it should be. The figures are written to bench/results/<gpu>.json, for `bob plan`; with
--output to another file, and with --tiny or --only to no other.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results"
SECONDS = 470  # for all sections
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "timm", "onnxruntime-gpu", "onnxruntime")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A function of a Setting that returns figures, in a module that is imported when it runs."""

    module: str
    function: str
    budget: int
    """Seconds."""


SECTIONS = {
    one.function: one
    for one in (
        Section("bench.gpu_diffusion", "fine_tuning", 180),
        Section("bench.gpu_diffusion", "generation", 120),
        Section("bench.gpu_captioner", "captioner", 45),
        Section("bench.gpu_classifiers", "classifiers", 120),
        Section("bench.gpu_diffusion", "resume", 120),
        Section("bench.gpu_classifiers", "onnx", 90),
        Section("bench.gpu_diffusion", "compiled", 150),
    )
}
"""What `bob plan` needs first, should the time not suffice for all."""


def run(name: str, scratch: Path, tiny: bool) -> Figures:
    """A section's figures, with its `status`: ok, wrong, failed or skipped, and the `reason`."""
    section = SECTIONS[name]
    try:
        from bench.gpu_setting import Setting

        function = getattr(importlib.import_module(section.module), section.function)
        figures = function(Setting(scratch, tiny))
    except Exception as error:  # whatever it is, the other sections go on
        if isinstance(error, ModuleNotFoundError) and _is_library(error.name or ""):
            return {"status": "skipped", "reason": f"{error.name} is not installed"}
        traceback.print_exc()
        text = " ".join(str(error).split())
        return {"status": "failed", "reason": f"{type(error).__name__}: {text}"[:500]}
    wrong = figures.pop("wrong", [])
    return {"status": "wrong" if wrong else "ok", "reason": "; ".join(wrong), **figures}


def _is_library(module: str) -> bool:
    return module.partition(".")[0] not in ("", "bench", "bob", "tests")


def run_apart(name: str, scratch: Path, tiny: bool, seconds: float) -> Figures:
    """As `run`, in a process of its own: an error of CUDA's is the end of all that a process does.

    It is killed after so many seconds.
    """
    target = scratch / f"{name}.json"
    command = [sys.executable, "-m", "bench.gpu", "--section", name, "--scratch", str(scratch)]
    try:
        ended = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])], cwd=ROOT, timeout=max(1, seconds)
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not ready after {seconds:.0f} s"}
    if not target.is_file():
        return {"status": "failed", "reason": f"its process ended with {ended.returncode}"}
    figures: Figures = json.loads(target.read_text())
    return figures


def check(names: Sequence[str], scratch: Path, tiny: bool) -> dict[str, Figures]:
    """The figures of these sections, each told as it comes."""
    end = time.monotonic() + SECONDS
    sections: dict[str, Figures] = {}
    for name in names:
        began = time.monotonic()
        if tiny:
            figures = run(name, scratch, tiny)
        elif end - began < 20:
            figures = {"status": "failed", "reason": "no time was left"}
        else:
            figures = run_apart(name, scratch, tiny, min(SECTIONS[name].budget, end - began))
        sections[name] = {"seconds": time.monotonic() - began, **figures}
        for line in told(name, sections[name]):
            print(line, flush=True)
    return sections


def told(name: str, figures: Figures) -> Iterator[str]:
    """A line on a section, and one for each of its figures."""
    reason = f" ({figures['reason']})" if figures["reason"] else ""
    print()
    yield f"{name}: {figures['status']}{reason}, {figures['seconds']:.0f} s"
    for key, value in flat(figures):
        if key not in ("status", "reason", "seconds"):
            yield f"  {key:<60} {value}"


def flat(figures: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Figures by their path, as `bf16 / tflops`; floats to four digits."""
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key} / ")
        else:
            yield before + key, rounded(value)


def rounded(value: Any) -> Any:
    """Floats, wherever they are, to four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


# --- the result ----------------------------------------------------------------------------------


def machine() -> Figures:
    """What the figures are of."""
    import torch

    gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "memory": torch.cuda.get_device_properties(0).total_memory if gpu else 0,
        "driver": driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "libraries": dict(versions()),
        "date": date.today().isoformat(),
    }


def versions() -> Iterator[tuple[str, str]]:
    """Of the libraries that are installed."""
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            yield name, importlib.metadata.version(name)


def driver() -> str | None:
    """The NVIDIA driver's version, where its tool is installed."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return told.splitlines()[0].strip() if told.strip() else None


def shares(sections: Mapping[str, Figures]) -> dict[str, dict[str, float]]:
    """Of the GPU's peak, by kind of work and precision, as `bob.models.gpus.Gpu` has them.

    Generation is that of the largest batch; what failed, or has no known peak, is not in it.
    """
    at = dict(flat(sections))
    generation, classifiers = (sections.get(one, {}) for one in ("generation", "classifiers"))
    batch = max(
        (name for name, value in generation.items() if name.startswith("batch_") and value != OOM),
        key=lambda name: int(name.removeprefix("batch_")),
        default="",
    )
    trained, auto = classifiers.get("precision"), generation.get("precision")
    found: dict[str, dict[Any, Any]] = {
        "finetune": {
            one: at.get(f"fine_tuning / {one} / share_of_peak") for one in ("bf16", "fp16", "fp32")
        },
        "generate": {
            "fp32": at.get(f"generation / {batch} / decoding / share_of_peak"),
            auto: at.get(f"generation / {batch} / denoising / share_of_peak"),
        },
        **{
            work: {
                "fp32": at.get(f"classifiers / {network} / looking / share_of_peak"),
                trained: at.get(f"classifiers / {network} / share_of_peak"),
            }
            for work, network in (("classify", "resnet50"), ("classify_clip", "clip_lora"))
        },
    }
    known = {
        work: {precision: share for precision, share in by.items() if precision and share}
        for work, by in found.items()
    }
    return {work: by for work, by in known.items() if by}


OOM = "does not fit"


def anonymous(value: Any) -> Any:
    """The same without folders and the machine's name, which errors may quote."""
    if isinstance(value, dict):
        return {key: anonymous(one) for key, one in value.items()}
    if isinstance(value, list):
        return [anonymous(one) for one in value]
    if not isinstance(value, str):
        return value
    without = re.sub(r"(?<![\w.])/(?:[^\s/:'\"()]+/)+", "", value)
    return without.replace(platform.node(), "HOST") if platform.node() else without


def slug(name: str) -> str:
    """A file's name for a GPU: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(result: Figures, path: Path) -> None:
    """Write the result as JSON, at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(json.dumps(result, indent=1) + "\n")
    draft.replace(path)


def command_line() -> argparse.ArgumentParser:
    """What `python -m bench.gpu` understands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small models, on any machine")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections")
    parser.add_argument("--output", type=Path, help="write the figures to this file")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    given = command_line().parse_args(arguments)
    if given.section:
        figures = run(given.section, given.scratch, given.tiny)
        write(figures, given.scratch / f"{given.section}.json")
        return 0
    import torch

    if not given.tiny and not torch.cuda.is_available():
        print("torch sees no GPU; --tiny runs on any machine", file=sys.stderr)
        return 1
    on = machine()
    with tempfile.TemporaryDirectory() as scratch:
        sections = check(given.only or list(SECTIONS), Path(scratch), given.tiny)
    result = anonymous({**on, "shares": rounded(shares(sections)), "sections": rounded(sections)})
    path = given.output
    if path is None and not given.tiny and not given.only:
        path = RESULTS / f"{slug(on['gpu'])}.json"
    if path:
        write(result, path)
        print(f"\nwritten: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    bad = [name for name, figures in sections.items() if figures["status"] in ("wrong", "failed")]
    print(f"{len(sections)} sections; {', '.join(bad) or 'none'} failed or not as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
