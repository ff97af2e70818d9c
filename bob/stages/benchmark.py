"""Stage `benchmark`: accuracy, latency and throughput of the ONNX classifier, in each precision
that was exported, beside torch's.

Latency is from a normalised batch in the host's memory to logits in the host's memory, so copies
to a GPU and back count. All have the same threads, torch has full float32 precision, and they take
turns, so that whatever else the machine does hits both.
"""

import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from bob.formats import layout
from bob.formats.files import read_json, replacing, write_csv, write_json
from bob.formats.params import Params
from bob.formats.photos import read_photos
from bob.models.classifiers import REAL_AND_SYNTHETIC, Trained, load_classifier, read_trained
from bob.models.device import computing_device
from bob.models.preprocessing import Preprocessing, read_inputs

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Logits [N, classes] of a batch [N, 3, H, W]."""
Timings = dict[int, dict[str, dict[str, float]]]
"""Batch size -> runtime -> its timings."""

GPU_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider")  # the best first
ROUNDS = 5
PERCENTILES = (50, 95, 99)
IN_METRICS = ("p50_ms", "p95_ms", "images_per_second")  # of fp16 and int8; the tables have all


def run(params: Params) -> None:
    """Write `metrics/onnx.json` and, for plots, a table of timings for each runtime."""
    trained = read_trained()
    photos = read_photos(layout.TEST)
    checks = read_json(layout.PRECISION_CHECKS)
    sessions = {"onnxruntime": best_session(layout.ONNX)} | {
        f"onnxruntime_{precision}": best_session(layout.reduced_onnx(precision))
        for precision, check in checks.items()
        if check["survived"]
    }
    torch_run, device = torch_runner(trained)
    runs = {name: onnx_runner(session) for name, session in sessions.items()} | {"torch": torch_run}

    labels = [trained.classes.index(photo.class_name) for photo in photos]
    accuracy = accuracies(runs, [photo.path for photo in photos], labels, trained.preprocessing)
    if accuracy["onnxruntime"] != accuracy["torch"]:
        click.echo(
            f"warning: on test, ONNX Runtime's top-1 is {accuracy['onnxruntime']} % and torch's "
            f"{accuracy['torch']} %"
        )
    image = np.concatenate(
        [batch.numpy() for batch in read_inputs([photos[0].path], trained.preprocessing)]
    )
    timings = timings_by_size(runs, image, params.benchmark.batch_sizes, params.benchmark.repeats)
    metrics = fp32_metrics(accuracy, timings, sessions["onnxruntime"], device)
    for precision, check in checks.items():
        compared_keys = ("survived", "agreement") if check["photos"] else ("survived",)
        metrics[precision] = {key: check[key] for key in compared_keys}
        if check["survived"]:
            session = sessions[f"onnxruntime_{precision}"]
            metrics[precision] |= reduced_metrics(precision, accuracy, timings, session)
    write_tables(timings)
    write_json(layout.ONNX_METRICS, metrics)
    for name, session in sessions.items():
        click.echo(
            f"benchmark: {name}, {session.get_providers()[0]}, reaches {fastest(timings, name)}, "
            f"top-1 {accuracy[name]} %, torch's {accuracy['torch']} %"
        )


def fp32_metrics(
    accuracy: dict[str, float],
    timings: Timings,
    session: onnxruntime.InferenceSession,
    device: torch.device,
) -> dict[str, Any]:
    """What there is to say of the fp32 file, of torch and of the machine."""
    return {
        **{
            f"batch_{size}": compared(timing["onnxruntime"], timing["torch"])
            for size, timing in timings.items()
        },
        "top1": accuracy["onnxruntime"],
        "torch_top1": accuracy["torch"],
        "provider": session.get_providers()[0],
        "processor": processor_name(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "none",
        "threads": torch.get_num_threads(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "model_mb": megabytes(layout.ONNX),
    }


def reduced_metrics(
    precision: str,
    accuracy: dict[str, float],
    timings: Timings,
    session: onnxruntime.InferenceSession,
) -> dict[str, Any]:
    """What there is to say of the file of another precision."""
    name = f"onnxruntime_{precision}"
    return {
        **{
            f"batch_{size}": beside_fp32(timing[name], timing["onnxruntime"])
            for size, timing in timings.items()
        },
        "top1": accuracy[name],
        "provider": session.get_providers()[0],
        "model_mb": megabytes(layout.reduced_onnx(precision)),
    }


def write_tables(timings: Timings) -> None:
    """A table for each runtime, by batch size: without rows where the precision was not exported,
    because a plot of DVC names all of them.
    """
    names = ("onnxruntime", *(f"onnxruntime_{one}" for one in layout.PRECISIONS), "torch")
    columns = list(next(iter(timings.values()))["onnxruntime"])
    with replacing(layout.BENCHMARK) as folder:
        for name in names:
            rows = [
                [size, *timing[name].values()] for size, timing in timings.items() if name in timing
            ]
            write_csv(folder / f"{name}.csv", ["batch_size", *columns], rows)


def fastest(timings: Timings, name: str) -> str:
    """The best throughput of a runtime, and the batch size that has it."""
    rates = {size: timing[name]["images_per_second"] for size, timing in timings.items()}
    size = max(rates, key=lambda size: rates[size])
    return f"{rates[size]} images/s (batches of {size})"


def megabytes(path: Path) -> float:
    """A file's size in MB."""
    return round(path.stat().st_size / 1e6, 2)


# --- runtimes -----------------------------------------------------------------------------------


def best_session(path: Path) -> onnxruntime.InferenceSession:
    """A session on the best execution provider that really starts: TensorRT, CUDA, else the CPU.

    The list of available providers says only what ONNX Runtime was built with. Whether their
    libraries load shows when a session starts, and a failure there fills the screen from C++; so
    nothing is tried without a GPU, and the attempts are silent. The session tells which it was;
    where there is a GPU and it is the CPU, a warning says why.
    """
    failed = []
    for name in GPU_PROVIDERS if computing_device().type == "cuda" else ():
        session = start_session(path, name)
        if not isinstance(session, str):
            return session
        failed.append(f"{name} {session}")
    if failed:
        click.echo(f"warning: {path.name} runs on the CPU: {'; '.join(failed)}", err=True)
    return onnxruntime.InferenceSession(
        path, _session_options(), providers=["CPUExecutionProvider"]
    )


def start_session(path: Path, provider: str) -> onnxruntime.InferenceSession | str:
    """A session on that execution provider of the computing device, or why there is none."""
    if provider not in onnxruntime.get_available_providers():
        return "is not in this build of ONNX Runtime"
    options, device = _session_options(), computing_device()
    on_gpu = provider in GPU_PROVIDERS and device.type == "cuda"
    settings = {"device_id": str(device.index)} if on_gpu else {}
    if provider == "CUDAExecutionProvider":
        settings["use_tf32"] = "0"
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=[(provider, settings)], enable_fallback=False
        )
    except Exception as error:  # whatever a provider throws, the next one may work
        return f"does not start ({' '.join(str(error).split())[:200]})"
    if session.get_providers()[0] != provider:
        return "does not start (its libraries do not load)"
    return session


def _session_options() -> onnxruntime.SessionOptions:
    onnxruntime.set_default_logger_severity(4)  # fatal only
    # TensorRT rounds to TF32 unless this is set, and has no option for it of its own.
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    # A waiting thread must not spin: it would take the processor from torch's turn.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def onnx_runner(session: onnxruntime.InferenceSession) -> Run:
    """The ONNX model as a function from arrays to arrays."""
    return lambda batch: session.run(["logits"], {"image": batch})[0]


def torch_runner(trained: Trained) -> tuple[Run, torch.device]:
    """The torch model that was exported as a function from arrays to arrays, and its device."""
    device = computing_device()
    torch.backends.cudnn.allow_tf32 = False  # as ONNX Runtime's session is set up
    seed = trained.best_seed(REAL_AND_SYNTHETIC)
    model = load_classifier(REAL_AND_SYNTHETIC, seed)
    model.to(device).to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run_torch(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return model(torch.from_numpy(batch).to(device)).cpu().numpy()

    return run_torch, device


def processor_name() -> str:
    """The CPU's model where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# --- measures -----------------------------------------------------------------------------------


def accuracies(
    runs: dict[str, Run], paths: list[str], labels: list[int], preprocessing: Preprocessing
) -> dict[str, float]:
    """Top-1 accuracy in percent of each runtime on the images at `paths`."""
    hits = dict.fromkeys(runs, 0)
    seen = 0
    for batch in read_inputs(paths, preprocessing):
        wanted = np.array(labels[seen : seen + len(batch)])
        for name, run_batch in runs.items():
            hits[name] += int((run_batch(batch.numpy()).argmax(1) == wanted).sum())
        seen += len(batch)
    return {name: round(100 * count / seen, 2) for name, count in hits.items()}


def timings_by_size(
    runs: dict[str, Run], image: NDArray[np.float32], sizes: Sequence[int], repeats: int
) -> Timings:
    """Timings on batches of one `image` [1, 3, H, W]."""
    return {
        size: {
            name: summarise(milliseconds, size)
            for name, milliseconds in measure(runs, np.repeat(image, size, axis=0), repeats).items()
        }
        for size in tqdm(sizes, desc="benchmark", disable=None)
    }


def compared(onnx: dict[str, float], pytorch: dict[str, float]) -> dict[str, float]:
    """The timings of both runtimes side by side, and how many times faster ONNX Runtime is."""
    return {
        **onnx,
        **{f"torch_{key}": value for key, value in pytorch.items()},
        "speedup": round(pytorch["p50_ms"] / onnx["p50_ms"], 2),
    }


def beside_fp32(reduced: dict[str, float], fp32: dict[str, float]) -> dict[str, float]:
    """The timings of a precision, and how many times faster it is than fp32 in ONNX Runtime."""
    return {
        **{key: reduced[key] for key in IN_METRICS},
        "speedup": round(fp32["p50_ms"] / reduced["p50_ms"], 2),
    }


def measure(
    runs: dict[str, Run], batch: NDArray[np.float32], repeats: int
) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each runtime on `batch`, in ROUNDS turns.

    The first call of every turn is not counted: it finds the other runtime's data in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS):
        count = repeats * (turn + 1) // ROUNDS - repeats * turn // ROUNDS
        for name, run_batch in runs.items():
            run_batch(batch)
            for _ in range(count):
                start = time.perf_counter()
                run_batch(batch)
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def summarise(milliseconds: list[float], batch_size: int) -> dict[str, float]:
    """Latency percentiles in milliseconds, and images per second over all calls."""
    percentiles = {f"p{p}_ms": round(float(np.percentile(milliseconds, p)), 3) for p in PERCENTILES}
    total = sum(milliseconds) / 1000
    return {**percentiles, "images_per_second": round(batch_size * len(milliseconds) / total, 1)}
