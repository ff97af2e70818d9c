"""Classify photos with a classifier that bob exported: `python predict.py PHOTO...`.

This file and an exported `classifier.onnx` suffice, with numpy, Pillow and onnxruntime: no bob, no
torch. The ONNX file's metadata says what the classes are and how it wants images. bob copies this
file to `results/export/predict.py`, and `bob predict` runs it.

    from predict import Classifier

    for prediction in Classifier("classifier.onnx").predict(["photo.jpg"], top=3):
        print(prediction.photo, prediction.top, prediction.error)
"""

import argparse
import csv
import glob
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import numpy as np
    import onnxruntime
    from numpy.typing import NDArray
    from PIL import Image, ImageOps, UnidentifiedImageError
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"predict.py: {error}; it needs: pip install numpy pillow onnxruntime")

FORMATS = ("table", "csv", "json")
# Pillow's others are not asked, whatever a file is called: that for EPS starts Ghostscript.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
BATCH = 32
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}  # in a folder
# Grey of 16 or 32 bits, or of floats, which Pillow would cut off at 255: most of it is white then.
DEEP = ("I", "F")
CROP_MODES = ("center", "squash", "border")
# What metadata of another kind lead to.
WRONG = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
LARGEST = 16384  # pixels of an input's side

BLACK = (0, 0, 0)
BORDER = (124, 116, 104)  # ImageNet's mean, of which timm makes borders unless told otherwise


class ModelError(Exception):
    """The model cannot be used; the message is one line that names its file."""


@dataclass(frozen=True)
class Prediction:
    """What the classifier says of one photo."""

    photo: str
    """Its path, or the argument that led to no photo."""
    top: tuple[tuple[str, float], ...] = ()
    """Classes and their probabilities (softmax of the logits), the most probable first."""
    error: str = ""
    """Why there is none, in a line."""


class Classifier:
    """A classifier that bob exported, on the CPU."""

    def __init__(self, model: str | Path) -> None:
        """Open the ONNX file `model`; raises ModelError where that is none, or none of bob's."""
        if not Path(model).is_file():
            raise ModelError(f"{model} is no file; --model names a classifier that bob exported")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is told in the error
        # Threads that wait for the next batch must not spin: the decoders need the processor.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = onnxruntime.InferenceSession(
                str(model), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has one class for each of its status codes
            raise ModelError(f"{model} cannot be loaded as ONNX ({_line(error)})") from None
        self.model = model
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self.classes: list[str] = json.loads(metadata["classes"])
            self.preprocessing: dict[str, Any] = json.loads(metadata["preprocessing"])
            self._check()
        except WRONG:
            raise ModelError(
                f"{model} was not exported by bob: its metadata does not say what its classes are "
                "and how it wants images"
            ) from None

    def _check(self) -> None:
        """Raise ValueError, or what comes of it, where metadata or network are not as bob's."""
        how = self.preprocessing
        fits = (
            isinstance(self.classes, list)
            and all(isinstance(name, str) for name in self.classes)
            and [one.name for one in self.session.get_inputs()] == ["image"]
            and [one.shape[1:] for one in self.session.get_outputs() if one.name == "logits"]
            == [[len(self.classes)]]
            and [type(side) for side in how["size"]] == [int, int]
            and all(0 < side <= LARGEST for side in how["size"])
            and 0 < max(how["size"]) / how["crop_pct"] <= LARGEST
            and all(np.shape(how[key]) == (3,) for key in ("mean", "std"))
            and bool(np.isfinite(how["mean"]).all() and (np.array(how["std"]) > 0).all())
            and how["interpolation"].upper() in Image.Resampling.__members__
            and how["crop_mode"] in CROP_MODES
        )
        if not fits:
            raise ValueError

    def predict(self, photos: Sequence[str | Path], top: int = 1) -> Iterator[Prediction]:
        """Classify the photos at these paths, in order; what cannot be read has an `error`."""
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(photos), BATCH):
                batch = photos[start : start + BATCH]
                inputs = list(threads.map(self._input_or_reason, batch))
                images = [one for one in inputs if not isinstance(one, str)]
                logits = iter(self.logits(np.stack(images)) if images else ())
                for photo, one in zip(batch, inputs, strict=True):
                    if isinstance(one, str):
                        yield Prediction(str(photo), error=one)
                    else:
                        yield Prediction(str(photo), self._best(next(logits), top))

    def logits(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [N, classes] of images [N, 3, height, width] as `network_input` makes them.

        Raises ModelError where the network does not take them.
        """
        try:
            return self.session.run(["logits"], {"image": images})[0]
        except Exception as error:  # onnxruntime has one class for each of its status codes
            raise ModelError(f"{self.model} cannot be run ({_line(error)})") from None

    def _input_or_reason(self, photo: str | Path) -> NDArray[np.float32] | str:
        try:
            return network_input(open_photo(photo), self.preprocessing)
        except FileNotFoundError:
            return "no such file"
        except UnidentifiedImageError:
            return f"not an image (none of {', '.join(IMAGE_FORMATS)})"
        except Exception as error:  # decoders raise whatever broken bytes lead them to
            return f"cannot be read as an image ({_line(error)})"

    def _best(self, logits: NDArray[np.float32], top: int) -> tuple[tuple[str, float], ...]:
        exponentials = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = exponentials / exponentials.sum()
        order = np.argsort(-logits, kind="stable")[:top]
        return tuple((self.classes[index], float(probabilities[index])) for index in order)


# --- from a photo to the network's input: the same as Pillow, timm and torch do in bob ------------


def open_photo(path: str | Path) -> Image.Image:
    """Decode an image completely, upright, as RGB; raises what Pillow raises."""
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.mode.startswith(DEEP):
            raise ValueError(f"its pixels are of mode {image.mode}; save it with 8 bits a channel")
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            upright = upright.convert("RGBA")
            canvas = Image.new("RGBA", upright.size, "white")
            upright = Image.alpha_composite(canvas, upright)
        return upright.convert("RGB")


def network_input(image: Image.Image, preprocessing: dict[str, Any]) -> NDArray[np.float32]:
    """Resize, crop and normalise an RGB image: float32 [3, height, width]."""
    pixels = np.asarray(resize_and_crop(image, preprocessing), dtype=np.float32)
    mean, std = (np.array(preprocessing[key], dtype=np.float32) for key in ("mean", "std"))
    return ((pixels / np.float32(255) - mean) / std).transpose(2, 0, 1)


def resize_and_crop(image: Image.Image, preprocessing: dict[str, Any]) -> Image.Image:
    """An RGB image in the network's size, as timm's transform for evaluation makes it."""
    height, width = preprocessing["size"]
    scaled = [math.floor(side / preprocessing["crop_pct"]) for side in (height, width)]
    mode, fill = preprocessing["crop_mode"], BLACK
    ratios = image.height / scaled[0], image.width / scaled[1]
    if mode == "squash":
        size = scaled[1], scaled[0]
    elif mode == "border":  # all of the image
        size, fill = _divided(image, max(ratios)), BORDER
    elif scaled[0] == scaled[1]:  # by torchvision, which rounds down
        shorter = min(image.size)
        size = scaled[0] * image.width // shorter, scaled[0] * image.height // shorter
    else:
        size = _divided(image, min(ratios))
    resampling = Image.Resampling[preprocessing["interpolation"].upper()]
    resized = image.resize(size, resampling)
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(resized, (_offset(width, size[0]), _offset(height, size[1])))
    return canvas


def _divided(image: Image.Image, ratio: float) -> tuple[int, int]:
    return round(image.width / ratio), round(image.height / ratio)


def _offset(wanted: int, side: int) -> int:
    """Where a centred side starts: within the wanted one, or, negative, before it."""
    return (wanted - side) // 2 if side < wanted else -round((side - wanted) / 2)


# --- from arguments to photos, and from predictions to text --------------------------------------


def find_photos(arguments: Iterable[str]) -> Iterator[Prediction]:
    """A photo for each file, in each folder and of each glob; `-` is a list of these on stdin.

    Whether a file can be read is not seen yet. What leads to no photo is told as `error`.
    """
    for argument in arguments:
        if argument == "-":
            listed = [os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer]
            found = [one for line in listed if line.strip() for one in _photos_of(line)]
            yield from found or [Prediction("-", error="standard input lists no photo")]
        else:
            yield from _photos_of(argument)


def _photos_of(argument: str) -> list[Prediction]:
    if Path(argument).is_dir():
        return _inside(Path(argument)) or [Prediction(argument, error="a folder without photos")]
    if not Path(argument).exists() and glob.has_magic(argument):
        matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 (may be absolute)
        return [one for match in matches for one in _photos_of(match)] or [
            Prediction(argument, error="nothing matches")
        ]
    return [Prediction(argument)]


def _inside(folder: Path) -> list[Prediction]:
    """A photo for each file in a folder, and an error for each folder in it that cannot be read."""
    unread: list[Prediction] = []

    def note(error: OSError) -> None:
        unread.append(Prediction(str(error.filename), error=f"cannot be read ({error.strerror})"))

    found = [
        Path(where, name) for where, _, names in os.walk(folder, onerror=note) for name in names
    ]
    photos = sorted(path for path in found if _is_photo(path, folder))
    return [*(Prediction(str(path)) for path in photos), *unread]


def _is_photo(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def run(arguments: Sequence[str], model: str | Path, top: int = 3, form: str = "table") -> bool:
    """Print what the model says of each photo, as it goes; False where one could not be read.

    Raises ModelError.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of photos that it reads all the same
    # A file's name may be no text, and the locale's encoding may lack a class's letters.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    classifier = Classifier(model)
    found = list(find_photos(arguments))
    predicted = classifier.predict([one.photo for one in found if not one.error], top)
    errors = []

    def predictions() -> Iterator[Prediction]:
        for one in found:
            prediction = one if one.error else next(predicted)
            errors.extend([prediction.error] if prediction.error else [])
            yield prediction

    if form == "json":
        _print_json(predictions())
    elif form == "csv":
        _print_csv(predictions())
    else:
        longest = max(len(_shown(one.photo)) for one in found)
        _print_table(predictions(), longest, max(len(_shown(one)) for one in classifier.classes))
    return not errors


def _print_table(predictions: Iterable[Prediction], photo_width: int, class_width: int) -> None:
    for one in predictions:
        cells = [
            f"{_shown(name):<{class_width}} {probability:>6.1%}" for name, probability in one.top
        ]
        print(f"{_shown(one.photo):<{photo_width}}  {'   '.join(cells) or _shown(one.error)}")


def _shown(name: str) -> str:
    """A name without what would break its line: a file's may hold anything."""
    return name if name.isprintable() else repr(name)[1:-1]


def _print_csv(predictions: Iterable[Prediction]) -> None:
    """A row for each photo and class; for a photo that cannot be read one with the reason."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["photo", "rank", "class", "probability", "error"])
    for one in predictions:
        for rank, (name, probability) in enumerate(one.top, start=1):
            table.writerow([one.photo, rank, name, f"{probability:.6f}", ""])
        if one.error:
            table.writerow([one.photo, "", "", "", one.error])


def _print_json(predictions: Iterable[Prediction]) -> None:
    """A list with an object for each photo, an object a line."""
    start = "["
    for one in predictions:
        top = [{"class": name, "probability": round(value, 6)} for name, value in one.top]
        said = {"error": one.error} if one.error else {"top": top}
        print(f"{start}{json.dumps({'photo': one.photo, **said}, ensure_ascii=False)}", end="")
        start = ",\n "
    print("]")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1")
    return int(text)


def command_line() -> argparse.ArgumentParser:
    """What `python predict.py` understands."""
    parser = argparse.ArgumentParser(description="Classify photos with a classifier of bob's.")
    parser.add_argument(
        "photos",
        nargs="+",
        metavar="PHOTO",
        help="a photo, a folder, a glob, or - for a list of these on standard input",
    )
    parser.add_argument(
        "--model",
        default=Path(__file__).with_name("classifier.onnx"),
        metavar="FILE",
        help="an exported classifier (default: classifier.onnx beside this file)",
    )
    parser.add_argument("--top", type=_count, default=3, help="how many classes (default: 3)")
    parser.add_argument("--format", choices=FORMATS, default="table", help="(default: table)")
    return parser


def main() -> int:
    """Run the command line; returns the exit status, 1 where a photo could not be read."""
    given = command_line().parse_args()
    try:
        all_read = run(given.photos, given.model, given.top, given.format)
        sys.stdout.flush()
        return 0 if all_read else 1
    except ModelError as error:
        print(f"predict.py: {_shown(str(error))}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk; or `| head`, which has what it wanted
        if not isinstance(error, BrokenPipeError):
            print(f"predict.py: {_shown(_line(error))}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
