"""`bob predict`: an exported classifier on photos, by the file that is exported beside it."""

from collections.abc import Sequence
from pathlib import Path

from bob.errors import BobError
from bob.formats.layout import ONNX
from bob.models import predictor


def predict(photos: Sequence[str], model: Path | None, top: int, form: str) -> bool:
    """Print a line for each photo; False where one could not be read.

    `model` is by default the run's. Raises BobError where it is missing or not exported by bob.
    """
    if model is None and not ONNX.is_file():
        raise BobError(
            f"{ONNX} is missing; `dvc repro export` makes it or `dvc pull` fetches it, and --model "
            "names another"
        )
    try:
        return predictor.run(photos, model or ONNX, top, form)
    except predictor.ModelError as error:
        raise BobError(str(error)) from None
