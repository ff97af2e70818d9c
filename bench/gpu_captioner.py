"""Of `bench.gpu`: the captioner's path on a GPU, by a small model of Qwen2.5-VL's classes."""

from itertools import permutations

import numpy as np
from PIL import Image

from bench.gpu_setting import Figures, Setting
from bob.models.vlm import VisionLanguageModel
from tests.builders import build_captioner

QUESTION = "What is the background of this photo?"
TOKENS = 8
BATCH = 3
SIZES = ((112, 112), (84, 140), (168, 84))  # of the images, in pixels


def captioner(setting: Setting) -> Figures:
    """The answers about three images, whatever other images are asked about with them.

    Random weights say the same nonsense only where they are computed from the same numbers.
    """
    folder = setting.built("captioner", build_captioner)
    model = VisionLanguageModel(folder, setting.auto, BATCH)
    random = np.random.default_rng(0)
    patches = [Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)) for _ in SIZES]
    images = [
        patch.resize(size, Image.Resampling.NEAREST)
        for patch, size in zip(patches, SIZES, strict=True)
    ]
    alone = [model.answer([image], QUESTION, TOKENS)[0] for image in images]
    wrong = []
    if len(set(alone)) < len(images):
        wrong.append("two images have one answer, so that these tell nothing")
    for order in permutations(range(BATCH)):
        answers = model.answer([images[number] for number in order], QUESTION, TOKENS)
        wrong += [
            f"image {number} in the batch {order} has another answer than alone"
            for number, answer in zip(order, answers, strict=True)
            if answer != alone[number]
        ]
    _, network = model._loaded
    if network.device.type != setting.device.type:
        wrong.append(f"the model is on {network.device}")
    seconds = setting.median(lambda: model.answer(images, QUESTION, TOKENS), 5)
    return {"precision": setting.auto, "seconds_a_batch": seconds, "wrong": wrong}
