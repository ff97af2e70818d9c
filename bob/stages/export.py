"""Stage `export`: the classifier of real and synthetic images that is best on validation, as ONNX.

The file needs no bob: its metadata holds the class names, the descriptor and the preprocessing.
Input `image` is float32 [batch, 3, height, width], normalised; output `logits` is [batch, classes].
Beside it lie `predict.py`, which takes photos to classes with it, a copy of bob's own predictor,
and in `reduced/` the same classifier in fewer bits.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from bob.errors import BobError, first_line
from bob.formats import layout
from bob.formats.files import replacing, replacing_file, write_json
from bob.formats.manifest import read_manifest
from bob.formats.params import Params
from bob.formats.photos import Photo, read_photos
from bob.models import predictor
from bob.models.backbones import predict
from bob.models.classifiers import REAL_AND_SYNTHETIC, Trained, load_classifier, read_trained
from bob.models.preprocessing import read_inputs
from bob.models.quantization import CALIBRATED, Check, reduce, spread

TOLERANCE = 1e-3  # of a logit
CHECKED_PHOTOS = 8
MAX_BYTES = 2 * 1000**3  # protobuf's limit is 2 GiB for the whole file


def run(params: Params) -> None:
    """Write `results/export/classifier.onnx`, checked against the torch model on shots,
    `predict.py`, and `reduced/`.
    """
    trained = read_trained()
    seed = trained.best_seed(REAL_AND_SYNTHETIC)
    model = load_classifier(REAL_AND_SYNTHETIC, seed)
    photos = read_photos(layout.TRAIN)
    # Spread over the list, which is sorted by class.
    chosen = [photo.path for photo in photos[:: max(1, len(photos) // CHECKED_PHOTOS)]]
    inputs = torch.cat(list(read_inputs(chosen[:CHECKED_PHOTOS], trained.preprocessing)))
    with replacing_file(layout.ONNX) as path:
        write_onnx(model, trained, path)
        difference = check_onnx(path, model, inputs)
        size = path.stat().st_size / 1e6
    with replacing_file(layout.PREDICT) as path:
        shutil.copyfile(predictor.__file__, path)
    checks = write_reduced(params.export.precisions, trained)
    click.echo(
        f"export: {layout.ONNX}, {size:.1f} MB, {REAL_AND_SYNTHETIC} of seed {seed}; its logits "
        f"differ from torch's by {difference:.1e} at most"
    )
    for precision, check in checks.items():
        click.echo(told(precision, check))


def write_reduced(precisions: Sequence[str], trained: Trained) -> dict[str, Check]:
    """Write `results/export/reduced/`: a file for each of the precisions but fp32, and the checks.

    The calibration images are those of training, photos and synthetic; the photos of the checks are
    those of validation, or else of training.
    """
    train, val = read_photos(layout.TRAIN), read_photos(layout.VAL)
    photos = val or train
    wanted = [precision for precision in layout.PRECISIONS if precision in precisions]
    checks = {}
    with replacing(layout.REDUCED) as folder:
        if wanted:
            calibration = _inputs(calibration_images(train), trained)
            inputs = _inputs([photo.path for photo in photos], trained)
            labels = torch.tensor([trained.classes.index(photo.class_name) for photo in photos])
        for precision in wanted:
            target = folder / layout.reduced_onnx(precision).name
            checks[precision] = reduce(precision, layout.ONNX, target, calibration, inputs, labels)
        write_json(
            folder / layout.PRECISION_CHECKS.name,
            {precision: asdict(check) for precision, check in checks.items()},
        )
    return checks


def calibration_images(train: Sequence[Photo]) -> list[str]:
    """Training images by which activations' ranges are found, spread over the classes."""
    generated = [str(layout.GENERATE / image.file) for image in read_manifest()]
    return [*spread([photo.path for photo in train], CALIBRATED), *spread(generated, CALIBRATED)]


def _inputs(paths: Sequence[str], trained: Trained) -> Tensor:
    return torch.cat(list(read_inputs(paths, trained.preprocessing)))


def told(precision: str, check: Check) -> str:
    """One line on a file of fewer bits, a warning where there is none."""
    if not check.survived:
        return f"warning: this network does not survive {precision} ({check.reason}); use fp32"
    return (
        f"export: {layout.reduced_onnx(precision)}, top-1 {check.top1} % on {check.photos} photos, "
        f"fp32's {check.fp32_top1} %; the same class for {check.agreement} %"
    )


def write_onnx(model: nn.Module, trained: Trained, path: Path) -> None:
    """Write `model` (on the CPU) as one ONNX file with a dynamic batch size.

    The same model gives the same bytes. Raises BobError for a model too large for one file.
    """
    model = model.eval()
    if sum(tensor.nbytes for tensor in model.state_dict().values()) > MAX_BYTES:
        raise BobError(
            "the classifier is over 2 GB, more than one ONNX file can hold; "
            "set classify.backbone to a smaller network"
        )
    example = torch.zeros(2, 3, *trained.preprocessing.size)  # batch 1 would be taken as constant
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _strip_origin(proto)
    metadata = {
        "classes": list(trained.classes),
        "descriptor": trained.descriptor,
        # Before the rest: a photo's EXIF says how it is to be turned.
        "preprocessing": {"orientation": "exif", **asdict(trained.preprocessing)},
    }
    onnx.helper.set_model_props(
        proto, {key: json.dumps(value, ensure_ascii=False) for key, value in metadata.items()}
    )
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _strip_origin(proto: onnx.ModelProto) -> None:
    """Drop what the exporter notes of where each node came from: absolute paths of this machine."""
    functions = list(proto.functions)
    for holder in [proto, proto.graph, *functions]:
        holder.ClearField("metadata_props")
        holder.ClearField("doc_string")
    for graph in [proto.graph, *functions]:
        values = [] if graph in functions else [*graph.input, *graph.output, *graph.initializer]
        for item in [*graph.node, *graph.value_info, *values]:
            item.ClearField("metadata_props")
            item.ClearField("doc_string")


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers that only tell of errors while the block runs."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def check_onnx(path: Path, model: nn.Module, inputs: Tensor) -> float:
    """The largest difference between ONNX Runtime's logits and torch's, one by one and together.

    `inputs` is float32 [N, 3, H, W]. Both run on the CPU, where neither rounds to TF32. Raises
    BobError where the file is not valid ONNX or a logit differs by more than TOLERANCE.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BobError(f"the exported classifier is not valid ONNX ({first_line(error)})") from None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = predict(model, [inputs], torch.device("cpu")).numpy()
    found = [session.run(["logits"], {"image": batch.numpy()})[0] for batch in inputs.split(1)]
    together = session.run(["logits"], {"image": inputs.numpy()})[0]
    difference = max(
        float(np.abs(np.concatenate(found) - expected).max()),
        float(np.abs(together - expected).max()),
    )
    if not difference <= TOLERANCE:
        raise BobError(
            f"the exported classifier's logits differ from torch's by {difference:.1e}, more than "
            f"{TOLERANCE:.0e}; this network does not survive the export, try another "
            "classify.backbone"
        )
    return difference
