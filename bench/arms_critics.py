"""What judges generated images: critics, and the judge that knows the truth.

For the filters and the soft labels of `bench.arms`.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench import generated_classes
from bench.arms_task import FewShot, Images, TrainingSet
from bench.arms_training import chosen
from bench.generated_classes import BACKBONE, read_pictures
from bob.cache.recipe import bare, item_key
from bob.formats.files import replacing_file, sha256
from bob.formats.prompts import Context
from bob.miniature import world
from bob.miniature.corpus import draw_pictures
from bob.miniature.world import CONTEXTS, TASK, corpus_variants
from bob.models.backbones import load_timm
from bob.models.device import computing_device
from bob.models.features import pooled_features
from bob.models.similarity import nearest

FOLDS = 3
JUDGES = Path("build/arms")  # git ignores it
JUDGE_STEPS, JUDGE_PICTURES = 600, 8
CONTEXT_VARIANTS = len(corpus_variants())

Critic = Callable[[FewShot, Images], Tensor]
"""Float [N]: how much it believes that an image shows what was asked for."""


def by_real_only(shots: FewShot, images: Images) -> Tensor:
    """The probability of the label by a classifier of the shots alone."""
    weights = shots.trained(shots.trainer(TrainingSet(shots.real)), 0, with_synthetic=False)
    return _of_labels(shots.probabilities(weights, images.labelled.paths), images)


def by_cross_fitting(shots: FewShot, images: Images) -> Tensor:
    """The probability of the label by classifiers of real and synthetic that have not seen it."""
    return _of_labels(cross_fitted(shots, images, seeds=(0,)), images)


def by_nearest_shot(shots: FewShot, images: Images) -> Tensor:
    """How much liker the nearest shot of its class is than the nearest of another.

    By cosine similarity in the features of the corpus' backbone, which knows no task class.
    """
    network, preprocessing = shots.backbone.features(), shots.backbone.preprocessing
    generated, real = (
        pooled_features(network, preprocessing, one.paths, computing_device())
        for one in (images.labelled, shots.real)
    )
    numbers, values = nearest(generated, real, len(real))
    own = np.array(shots.real.labels)[numbers] == np.array(images.labelled.labels)[:, None]
    best = [np.where(which, values, -np.inf).max(1) for which in (own, ~own)]
    return torch.from_numpy(best[0] - best[1])


def by_truth(shots: FewShot, images: Images) -> Tensor:
    """The probability of the label by a judge that was taught by true pictures without end."""
    return _of_labels(_judged(shots, read_pictures(images.labelled.paths)), images)


def by_chance(shots: FewShot, images: Images) -> Tensor:
    """Any number."""
    return torch.from_numpy(np.random.default_rng([*shots.seeds, 4]).random(len(images)))


CRITICS: Mapping[str, Critic] = {
    "real-only": by_real_only,
    "cross-fitted": by_cross_fitting,
    "nearest": by_nearest_shot,
    "truth": by_truth,
    "random": by_chance,
}


def truly_wrong(shots: FewShot, images: Images) -> np.ndarray:
    """Bool [N]: whether the judge that knows the truth names another class."""
    named = _judged(shots, read_pictures(images.labelled.paths)).argmax(1)
    return (named != torch.tensor(images.labelled.labels)).numpy()


def cross_fitted(shots: FewShot, images: Images, seeds: Sequence[int]) -> Tensor:
    """What classifiers say of images that they were not trained on: float [N, classes].

    The images are in FOLDS parts, each with every class; the shots are in all trainings. The mean
    over classifiers of these seeds.
    """
    said = torch.zeros(len(images), len(shots.task.classes))
    for fold in range(FOLDS):
        held = list(range(fold, len(images), FOLDS))
        others = [place for place in range(len(images)) if place % FOLDS != fold]
        trainer = shots.trainer(TrainingSet(shots.real, chosen(images.labelled, others)))
        paths = [images.labelled.paths[place] for place in held]
        for seed in seeds:
            said[held] += shots.probabilities(shots.trained(trainer, seed), paths) / len(seeds)
    return said


def _of_labels(probabilities: Tensor, images: Images) -> Tensor:
    return probabilities[torch.arange(len(images)), torch.tensor(images.labelled.labels)]


# --- the judge that knows the truth --------------------------------------------------------------


def _judged(shots: FewShot, pictures: Tensor) -> Tensor:
    """The judge's probabilities of the task's classes: float [N, classes]."""
    # The judge knows all classes of the miniature, of which the task may have the first few.
    places = [generated_classes.NAMES.index(name) for name in shots.task.classes]
    judge = _judge()
    with torch.inference_mode():
        return torch.cat([judge(batch).softmax(1)[:, places] for batch in pictures.split(256)])


def _judge() -> nn.Module:
    return _kept_judge(
        "class",
        len(TASK),
        lambda: generated_classes.pictures(range(JUDGE_PICTURES), generated_classes.JUDGE_SEED),
    )


def true_contexts(paths: Sequence[Path]) -> list[Context]:
    """What a judge sees in images that was taught contexts by true pictures of the corpus.

    Unlike the captioner it is in no part of the method, and it must name one of the 36.
    """

    def pictures() -> tuple[Tensor, Tensor]:
        drawn = draw_pictures(
            corpus_variants()[:CONTEXT_VARIANTS], range(1), generated_classes.JUDGE_SEED
        )
        return drawn.tensor(slice(None)), torch.from_numpy(drawn.context)

    judge = _kept_judge("context", len(CONTEXTS), pictures)
    with torch.inference_mode():
        named = torch.cat([judge(batch).argmax(1) for batch in read_pictures(paths).split(256)])
    return [Context(*CONTEXTS[number]) for number in named.tolist()]


def _kept_judge(
    what: str, classes: int, pictures: Callable[[], tuple[Tensor, Tensor]]
) -> nn.Module:
    """Trained once for all data seeds, in the workspace's build folder."""
    key = item_key(
        what=what,
        code=[bare(inspect.getsource(one)) for one in (generated_classes, world)],
        backbone=sha256(BACKBONE / "model.safetensors"),
        taught=[JUDGE_STEPS, JUDGE_PICTURES, CONTEXT_VARIANTS],
    )
    path = JUDGES / f"judge-{key[:12]}.safetensors"
    if not path.exists():
        trained = generated_classes.train_judge(*pictures(), JUDGE_STEPS, classes)
        with replacing_file(path) as draft:
            save_file(trained.state_dict(), draft)
    judge = load_timm(BACKBONE, classes)
    judge.load_state_dict(load_file(path))
    return judge.eval()
