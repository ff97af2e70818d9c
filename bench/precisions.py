"""fp32, fp16 and int8 in ONNX Runtime beside torch, at real sizes.

    python -m bench.precisions
    python -m bench.precisions --part birds

`networks`: ResNet-50 and ViT-B/16 at 224 pixels. Their weights are random, so only speed and size
count; the logits' distance from fp32's (root mean square, in fp32's standard deviations) shows that
the file computes the same. `birds`: EfficientNet-Lite0 with ImageNet weights, trained on photos of
Caltech-UCSD Birds, which are not ours to redistribute (BOB_BIRDS names the folder that holds
task/train and task/test): accuracy, by the pipeline's own stages. Runtimes take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import timm
import torch
from dvc.repo import Repo
from numpy.typing import NDArray
from tqdm import tqdm

from bob.formats import layout
from bob.formats.manifest import write_manifest
from bob.formats.params import Params, load
from bob.models.classifiers import Trained
from bob.models.preprocessing import Preprocessing
from bob.models.quantization import CONVERSIONS, logits_of
from bob.stages import benchmark, classify, export, split

ROOT = Path(__file__).resolve().parent.parent
BIRDS = Path(os.environ.get("BOB_BIRDS", ROOT.parent / "shared" / "data" / "birds")) / "task"
NETWORKS = ("resnet50", "vit_base_patch16_224")
CLASSES = tuple(f"class {number}" for number in range(100))
SIZES = (1, 8, 32)
PREPROCESSING = Preprocessing((224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
BACKBONE = "models/efficientnet-lite0"
# Few photos, and a network that is nearly good as it comes: a short training.
BIRDS_RECIPE = {
    **{"mix": "none", "learning_rate": 2e-4, "warmup_epochs": 0, "epochs": 8, "seeds": [0]},
    **{"backbone": BACKBONE, "precision": "fp32"},
}


def networks(repeats: int) -> None:
    """A table for each network of NETWORKS."""
    for name in NETWORKS:
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=len(CLASSES)).eval()
        images = torch.randn(max(SIZES), 3, 224, 224)
        with tempfile.TemporaryDirectory() as folder:
            files = {"fp32": Path(folder) / "fp32.onnx"}
            trained = Trained("bird", CLASSES, PREPROCESSING, (0,), {})
            export.write_onnx(model, trained, files["fp32"])
            for precision, (convert, *_) in CONVERSIONS.items():
                files[precision] = Path(folder) / f"{precision}.onnx"
                convert(files["fp32"], files[precision], images[:16])
            measure(name, model, files, images, repeats)


def measure(
    name: str,
    model: torch.nn.Module,
    files: dict[str, Path],
    images: torch.Tensor,
    repeats: int,
) -> None:
    """Time the files and torch on `images` [N, 3, H, W]."""
    runs = {
        kind: benchmark.onnx_runner(benchmark.best_session(path)) for kind, path in files.items()
    }
    last = model.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run_torch(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return last(torch.from_numpy(batch)).numpy()

    runs["torch"] = run_torch
    rates: dict[str, list[float]] = {kind: [] for kind in runs}
    for size in tqdm(SIZES, desc=name, disable=None):
        times = benchmark.measure(runs, images[:size].numpy(), max(5, repeats // size))
        for kind, milliseconds in times.items():
            rates[kind].append(1000 * size / float(np.median(milliseconds)))
    expected = logits_of(files["fp32"], images)
    rows = []
    for kind in runs:
        size_distance = ("", "")
        if kind in files:
            difference = logits_of(files[kind], images) - expected
            distance = np.sqrt(np.mean(difference**2)) / expected.std()
            size_distance = (f"{files[kind].stat().st_size / 1e6:.1f}", f"{distance:.4f}")
        pairs = zip(rates[kind], rates["fp32"], strict=True)
        rows.append((kind, *(f"{a:.1f} ({a / b:.2f})" for a, b in pairs), *size_distance))
    sizes = (f"images/s, batch {size} (times fp32)" for size in SIZES)
    print_table((name, *sizes, "MB", "distance"), rows)


def birds(repeats: int) -> None:
    """Train on the birds, export and benchmark by the stages; the metrics as a table."""
    if not BIRDS.is_dir():
        print(f"birds: skipped, no photos at {BIRDS} (set BOB_BIRDS)")
        return
    values = load()
    data = {"name": "birds", "shots": 10, "imbalance": 1, "seed": 0}
    values["data"] |= data | {"val_per_class": 10}
    values["classify"] |= BIRDS_RECIPE
    values["benchmark"] = {"batch_sizes": list(SIZES), "repeats": repeats}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Repo.init(no_scm=True).close()
        Path("data/birds").mkdir(parents=True)
        for part in ("train", "test"):
            Path("data/birds", part).symlink_to(BIRDS / part)
        Path("data/birds/dataset.yaml").write_text("descriptor: bird\n")
        script = ROOT / "bench/imagenet_backbone.py"
        subprocess.run([sys.executable, script, BACKBONE], check=True)
        split.run(Params(values, "split"))
        layout.GENERATE.mkdir(parents=True)
        write_manifest(layout.GENERATED, [])
        for stage in (classify, export, benchmark):
            stage.run(Params(values, stage.__name__))
        metrics = json.loads(layout.ONNX_METRICS.read_text())
        checks = json.loads(layout.PRECISION_CHECKS.read_text())
        os.chdir(ROOT)
    rows: list[tuple[object, ...]] = []
    for kind in ("fp32", *CONVERSIONS):
        values = metrics if kind == "fp32" else metrics[kind]
        rates = (values.get(f"batch_{size}", {}).get("images_per_second", "") for size in SIZES)
        same = checks[kind]["agreement"] if kind in checks else ""
        rows.append((kind, values.get("top1", "none"), same, *rates, values.get("model_mb", "")))
    torch_rates = (metrics[f"batch_{size}"]["torch_images_per_second"] for size in SIZES)
    rows.append(("torch", metrics["torch_top1"], "", *torch_rates, ""))
    sizes = (f"images/s, batch {size}" for size in SIZES)
    print_table(("birds", "top-1 on test", "same class, validation", *sizes, "MB"), rows)


def print_table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> None:
    """As Markdown."""
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |", flush=True)
    print(flush=True)


def main() -> None:
    """Print the tables of one part, or of both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=("networks", "birds"))
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    print(f"{benchmark.processor_name()}, threads: {torch.get_num_threads()}", flush=True)
    for part in (networks, birds):
        if arguments.part in (None, part.__name__):
            part(arguments.repeats)


if __name__ == "__main__":
    main()
