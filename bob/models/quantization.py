"""The exported classifier in fewer bits, fp16 and int8, each held against the fp32 file.

Input and output stay float32 and the metadata is the same, so that each file is used as the fp32
one is. int8 is ONNX Runtime's static quantization in QDQ format: weights int8 by output channel,
activations uint8 (on x86, ONNX Runtime has fast kernels for these alone), with the ranges that they
have on calibration images.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    create_calibrator,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import Tensor

from bob.formats.files import check_room

T = TypeVar("T")

CALIBRATED = 64  # images of each kind, photos and synthetic
BATCH = 8
WRITTEN = 8  # times the size of the fp32 file: more than a conversion writes
LARGEST_FP16 = float(np.finfo(np.float16).max)
MAX_DROP = 0.005  # of top-1; one photo is always allowed
MAX_DIFFERENT = 0.04  # of the classes named; likewise

PRODUCTS = ("Conv", "Gemm", "MatMul")
# Between the convolutions of a network these keep int8 going; without them it would go to float32
# and back there.
BETWEEN_CONVOLUTIONS = (
    *("Add", "Mul", "Relu", "Clip", "Sigmoid", "MaxPool", "AveragePool", "Concat", "Pad"),
)


class DoesNotFitError(Exception):
    """A network whose numbers this precision cannot hold; the message says which."""


@dataclass(frozen=True)
class Check:
    """How a file of fewer bits does beside the fp32 one."""

    survived: bool
    """Whether it can stand for the fp32 file; it is there only then."""
    reason: str
    """Why not; else empty."""
    photos: int = 0
    top1: float = 0.0
    """In percent of these photos."""
    fp32_top1: float = 0.0
    agreement: float = 0.0
    """Percent of the photos for which both name the same class."""


def reduce(
    precision: str, source: Path, target: Path, calibration: Tensor, inputs: Tensor, labels: Tensor
) -> Check:
    """Write the fp32 file `source` in `precision`, fp16 or int8, to `target`, and check it.

    `calibration` and `inputs` are float32 [N, 3, H, W], `labels` int64 [N], of `inputs`. The first
    of its conversions that survives the check is kept; where none does, there is no file.
    """
    expected = logits_of(source, inputs)
    for convert in CONVERSIONS[precision]:
        try:
            convert(source, target, calibration)
            check = compare(logits_of(target, inputs), expected, labels.numpy())
        except DoesNotFitError as error:
            check = Check(False, str(error))
        except Exception as error:  # each tool raises its own, where it cannot take a network
            for folder in (tempfile.gettempdir(), target.parent):
                check_room(Path(folder), WRITTEN * source.stat().st_size)
            if isinstance(error, OSError | MemoryError):  # of the machine, and not of the network
                raise
            check = Check(False, f"ONNX Runtime fails: {' '.join(str(error).split())}")
        if check.survived:
            return check
        target.unlink(missing_ok=True)
    return check


def compare(
    logits: NDArray[np.float32], expected: NDArray[np.float32], labels: NDArray[np.int64]
) -> Check:
    """Hold logits [N, classes] against the fp32 file's on photos of the classes `labels` [N].

    They survive where top-1 drops by MAX_DROP at most and at most MAX_DIFFERENT of the classes
    named are others. One photo is always allowed: of few photos it would be more than that.
    """
    count = len(labels)
    named, wanted = logits.argmax(1), expected.argmax(1)
    right, fp32_right = int((named == labels).sum()), int((wanted == labels).sum())
    different = int((named != wanted).sum())
    reason = ""
    if not np.isfinite(logits).all():
        reason = "logits are not finite"
    elif fp32_right - right > max(1, MAX_DROP * count):
        reason = f"right on {right} of {count} photos, fp32 on {fp32_right}"
    elif different > max(1, MAX_DIFFERENT * count):
        reason = f"another class than fp32's for {different} of {count} photos"
    return Check(
        not reason,
        reason,
        photos=count,
        top1=round(100 * right / count, 2),
        fp32_top1=round(100 * fp32_right / count, 2),
        agreement=round(100 - 100 * different / count, 2),
    )


def logits_of(model: Path, inputs: Tensor) -> NDArray[np.float32]:
    """Logits [N, classes] of float32 [N, 3, H, W], on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    batches = (batch.numpy() for batch in inputs.split(BATCH))
    return np.concatenate([session.run(["logits"], {"image": batch})[0] for batch in batches])


# --- conversions --------------------------------------------------------------------------------


def to_fp16(source: Path, target: Path, calibration: Tensor) -> None:
    """Write `source` with weights and activations in float16.

    Raises DoesNotFitError where an activation on the calibration images is beyond float16. ONNX
    Runtime's CPU provider would not show that: it computes most of a float16 network in float32.
    """
    largest = largest_activation(source, calibration)
    if not largest <= LARGEST_FP16:
        raise DoesNotFitError(
            f"an activation reaches {largest:.3g}, and float16 ends at {LARGEST_FP16:.0f}"
        )
    proto = convert_float_to_float16(onnx.load(source), keep_io_types=True)
    # It appends the casts of the input to the nodes; ONNX wants each before its use.
    OnnxModel.graph_topological_sort(proto.graph)
    target.write_bytes(proto.SerializeToString(deterministic=True))


def largest_activation(source: Path, images: Tensor) -> float:
    """The largest magnitude in any tensor that the network computes from float32 [N, 3, H, W]."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        onnx.shape_inference.infer_shapes_path(source, prepared)
        calibrator = create_calibrator(
            prepared,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=CalibrationMethod.MinMax,
        )
        calibrator.collect_data(_Batches(images))
        ranges = calibrator.compute_data()
        return max(float(np.abs(bounds.range_value).max()) for bounds in ranges.values())


def to_int8(source: Path, target: Path, calibration: Tensor, first: int = 0) -> None:
    """Write `source` quantized, its activations' ranges those on the calibration images.

    The `first` convolutions, and what lies before and between them, stay in float32: their rounding
    goes through all the others.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # The shape inference of onnx suffices; the symbolic one is of no more use here.
        with full_disk_raised(source.stat().st_size):
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        # A transformer's residual stream grows with depth: too much for 256 steps.
        normalised = any(node.op_type == "LayerNormalization" for node in graph.node)
        quantize_static(
            prepared,
            target,
            _Batches(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*PRODUCTS, *(() if normalised else BETWEEN_CONVOLUTIONS)],
            nodes_to_exclude=[*up_to_convolution(graph, first), *products_of_activations(graph)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # What a linear layer gives to an addition, GELU or softmax is wanted in float32.
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
    proto = onnx.load(target)
    # Of the many that ONNX Runtime lists, those in use: others need not know the rest.
    used = {node.domain for node in proto.graph.node}
    imports = [entry for entry in proto.opset_import if entry.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(imports)
    kept = {prop.key: prop.value for prop in onnx.load(source).metadata_props}
    onnx.helper.set_model_props(proto, kept)
    target.write_bytes(proto.SerializeToString(deterministic=True))


class _FullDisk(logging.Handler):
    """Raises OSError at a message where the disk has less than `size` bytes."""

    def __init__(self, size: int) -> None:
        super().__init__(logging.ERROR)
        self.size = size

    def emit(self, record: logging.LogRecord) -> None:
        check_room(Path(tempfile.gettempdir()), self.size)


@contextmanager
def full_disk_raised(size: int) -> Iterator[None]:
    """Raise OSError where the preparation finds the disk full.

    It would log that, and go on with a network that is not optimized: another result.
    """
    logger, handler = logging.getLogger(quant_pre_process.__module__), _FullDisk(size)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def up_to_convolution(graph: onnx.GraphProto, number: int) -> list[str]:
    """The names of the nodes up to this convolution, or the last one where there are fewer."""
    places = [place for place, node in enumerate(graph.node) if node.op_type == "Conv"]
    ends = [place + 1 for place in places[:number]]
    return [node.name for node in graph.node[: max(ends, default=0)]]


def products_of_activations(graph: onnx.GraphProto) -> list[str]:
    """Attention's: in int8 they lose accuracy and gain no speed."""
    weights = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type == "MatMul" and not weights.intersection(node.input)
    ]


CONVERSIONS: dict[str, tuple[Callable[[Path, Path, Tensor], None], ...]] = {
    "fp16": (to_fp16,),
    # The second costs ResNet-50 a quarter of its speed, and saves an EfficientNet two points.
    "int8": (to_int8, partial(to_int8, first=2)),
}
"""By precision, what to try in turn."""


class _Batches(CalibrationDataReader):
    """Images float32 [N, 3, H, W] in the form in which ONNX Runtime's calibration takes them."""

    def __init__(self, images: Tensor) -> None:
        self.batches: Iterator[Tensor] = iter(images.split(BATCH))

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"image": batch.numpy()}


def spread(items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, or all where they are fewer, at even distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
