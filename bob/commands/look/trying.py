"""A photo that is dropped on the page: what the exported classifier says, and the nearest shots."""

import tempfile
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from bob.errors import BobError
from bob.formats import params
from bob.formats.layout import ONNX, TRAIN
from bob.formats.photos import Photo, read_photos
from bob.models import predictor
from bob.models.backbones import open_backbone
from bob.models.features import pooled_features
from bob.models.similarity import nearest

TOP = 5
CPU = torch.device("cpu")


class Trial:
    """Tries photos; the classifier and the shots' features are kept while their files stay.

    All on the CPU: a GPU that is taken here would be taken from `dvc repro`.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._classifier: tuple[object, Any] = (None, None)
        self._shots: tuple[object, Any] = (None, None)

    def photo(self, content: bytes) -> dict[str, Any]:
        """The likeliest classes of a photo, and the shots nearest by `audit.feature_model`.

        Raises BobError where it cannot be read as an image, or there is no classifier yet.
        """
        if not ONNX.is_file():
            raise BobError(f"{ONNX} is missing; `dvc repro export` makes it")
        with self._lock, tempfile.NamedTemporaryFile(prefix="bob-look-") as file:
            file.write(content)
            file.flush()
            (prediction,) = self._opened().predict([file.name], top=TOP)
            if prediction.error:
                raise BobError(f"the photo: {prediction.error}")
            shots = self._nearest(Path(file.name))
        return {
            "top": [{"class": name, "probability": one} for name, one in prediction.top],
            "shots": [
                {"file": photo.path, "class": photo.class_name, "similarity": similarity}
                for photo, similarity in shots
            ],
        }

    def _opened(self) -> predictor.Classifier:
        made = ONNX.stat().st_mtime_ns
        if self._classifier[0] != made:
            try:
                self._classifier = made, predictor.Classifier(ONNX)
            except predictor.ModelError as error:
                raise BobError(str(error)) from None
        classifier: predictor.Classifier = self._classifier[1]
        return classifier

    def _nearest(self, path: Path) -> list[tuple[Photo, float]]:
        """The shots with the greatest cosine similarity, which is -1 to 1."""
        folder = Path(params.load()["audit"]["feature_model"])
        photos = read_photos(TRAIN)
        made = sorted((str(one), one.stat().st_mtime_ns) for one in folder.rglob("*"))
        key = made, [photo.sha256 for photo in photos]
        if self._shots[0] != key:
            backbone = open_backbone(folder)
            look = partial(pooled_features, backbone.features(), backbone.preprocessing, device=CPU)
            self._shots = key, (look, look([photo.path for photo in photos]))
        look, shots = self._shots[1]
        numbers, similarities = nearest(look([path]), shots, TOP)
        return [
            (photos[number], similarity)
            for number, similarity in zip(numbers[0], similarities[0].tolist(), strict=True)
        ]
