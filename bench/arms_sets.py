"""Arms of `bench.arms`: other sets to train on, at as many images and steps as BOB has.

First the controls: what is it about the images? Then what may be better than BOB.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.cluster import KMeans

from bench.arms_critics import cross_fitted
from bench.arms_task import FewShot, Images, TrainingSet, with_contexts
from bench.arms_training import relabelled, rounded, together
from bench.generated_classes import read_pictures
from bob.cache.recipe import item_key
from bob.commands.study.drawn import SEED, write_drawn_set
from bob.formats.files import sha256
from bob.formats.manifest import Generated
from bob.formats.photos import Task, open_image
from bob.formats.prompts import Context, Entry, prompt
from bob.miniature.measures import reconstructed
from bob.miniature.world import TASK, corpus_variants
from bob.models.training import Labelled
from bob.stages import generate
from bob.stages.classify import read_synthetic

PILOT = 0.5
"""Share of the images that are made before it is known where more are needed."""
CLUSTERS = 6
"""Of backgrounds, as many as a glance at a few dozen photos would tell apart."""


def real(shots: FewShot) -> TrainingSet:
    return TrainingSet(shots.real)


def bob(shots: FewShot) -> TrainingSet:
    images = shots.bobs_images()
    return TrainingSet(shots.real, images.labelled, images=images)


# --- controls ------------------------------------------------------------------------------------


def again(shots: FewShot) -> TrainingSet:
    """Batches as large as BOB's, without anything new in them."""
    return TrainingSet(shots.real, shots.real)


def shuffled(shots: FewShot) -> TrainingSet:
    """What differs between the two of a family is lost, what its members share is not."""
    images = shots.bobs_images()
    family = {variant.name: variant.family for variant in TASK}
    labels = np.array(images.labelled.labels)
    families = np.array([family[shots.task.classes[label]] for label in labels])
    random = np.random.default_rng([*shots.seeds, 1])
    for one in dict.fromkeys(families.tolist()):
        labels[families == one] = random.permutation(labels[families == one])
    return TrainingSet(shots.real, relabelled(images.labelled, labels.tolist()))


def foreign(shots: FewShot) -> TrainingSet:
    """Pairs of aircraft that the corpus has and the task has not, labelled with the task's."""
    known = {variant.family for variant in TASK}
    families: dict[str, list[str]] = {}
    for variant in corpus_variants():
        if variant.family not in known:
            families.setdefault(variant.family, []).append(variant.name)
    pairs = itertools.chain.from_iterable(names[:2] for names in families.values())
    task = Task(shots.task.descriptor, tuple(itertools.islice(pairs, len(shots.task.classes))))
    images = _of_bank(shots, shots.bank, task=task)
    return TrainingSet(shots.real, images.labelled, images=images)


def drawn(shots: FewShot) -> TrainingSet:
    """The ceiling: every class in all contexts equally often, by the true renderer."""
    write_drawn_set(shots.generating.images_per_class, SEED + shots.data_seed)
    return TrainingSet(shots.real, read_synthetic(shots.task))


# --- contexts ------------------------------------------------------------------------------------


def balanced(shots: FewShot) -> TrainingSet:
    """All classes go through the bank in one order, the next pass in another.

    So every class has each context equally often, after any number of images to within one, and
    context and class are independent in the set itself and not only on average. The plan of n
    images of a class is a prefix of that of more, as BOB's is.
    """
    pool = [entry.context for entry in shots.bank if entry.context]

    def contexts() -> Iterator[Context]:
        for turn in itertools.count():
            order = np.random.default_rng([*shots.seeds, 2, turn]).permutation(len(pool))
            yield from (pool[place] for place in order)

    counts = _counts(shots)
    images = _in_contexts(
        shots, {name: list(itertools.islice(contexts(), count)) for name, count in counts.items()}
    )
    return TrainingSet(shots.real, images.labelled, images=images)


def recombined(shots: FewShot) -> TrainingSet:
    """Backgrounds and poses as often as in the bank, but any with any."""
    seen = [entry.context for entry in shots.bank if entry.context]
    pairs = [Context(one.background, other.pose) for one in seen for other in seen]
    bank = [Entry("", name, pair) for name in shots.task.classes for pair in pairs]
    images = _of_bank(shots, bank)
    return TrainingSet(shots.real, images.labelled, images=images)


def clusters(shots: FewShot) -> TrainingSet:
    """Contexts without a captioner: the clusters of what lies around the aircraft.

    A photo's border, blurred to a few pixels, is its background's feature; a cluster's name is a
    number that the LoRA learns the meaning of. Poses have no name, so they stay tied to classes.
    """
    borders = np.stack([_border(path) for path in shots.real.paths])
    found = KMeans(min(CLUSTERS, len(borders)), n_init=10, random_state=0).fit_predict(borders)
    by_photo = {
        content: Context(f"number {number}", "usual")
        for content, number in zip(shots.real.sha256, found, strict=True)
    }
    bank = with_contexts(shots.bank, (by_photo[entry.image] for entry in shots.bank))
    images = _of_bank(shots, bank, trained_with=bank)
    return TrainingSet(shots.real, images.labelled, images=images)


def _border(path: Path) -> np.ndarray:
    """Colours along the edge of a picture, 8 x 8 pixels without the inner 6 x 4."""
    pixels = np.asarray(open_image(path).resize((8, 8), Image.Resampling.BOX), np.float64) / 255
    outside = np.ones((8, 8), bool)
    outside[2:6, 1:7] = False
    return pixels[outside].ravel()


# --- where the images go -------------------------------------------------------------------------


def where_needed(shots: FewShot) -> TrainingSet:
    """Half of BOB's images, then the other half for classes and contexts that validation confuses.

    A classifier trained on the first half says which; an image of a class in a context of the bank
    is made in proportion to its errors on that class's photos with such a background and with such
    a pose, as the captioner sees them. Each rate has one error in two photos added, so that none is
    zero.
    """
    settings, per_class = shots.generating, int(PILOT * shots.generating.images_per_class)
    pilot = shots.generated(
        lambda common: [
            image
            for image in generate.images_of(shots.task, shots.bank, settings, common)
            if image.number < per_class
        ]
    )
    rates = _error_rates(shots, TrainingSet(shots.real, pilot.labelled))
    pool = [entry.context for entry in shots.bank if entry.context]
    cells = [(name, context) for name in shots.task.classes for context in pool]
    weights = np.array(
        [
            rates.get((name, "background", context.background), 0.5)
            + rates.get((name, "pose", context.pose), 0.5)
            for name, context in cells
        ]
    )
    wanted: dict[str, list[Context]] = {name: [] for name in shots.task.classes}
    for image in pilot.about:
        assert image.context
        wanted[image.class_name].append(image.context)
    left = sum(_counts(shots).values()) - len(pilot)
    random = np.random.default_rng([*shots.seeds, 3])
    for cell in random.choice(len(cells), left, p=weights / weights.sum()):
        name, context = cells[cell]
        wanted[name].append(context)
    images = _in_contexts(shots, wanted)
    return TrainingSet(shots.real, images.labelled, images=images)


def _error_rates(shots: FewShot, what: TrainingSet) -> dict[tuple[str, str, str], float]:
    """(Class, attribute, phrase) -> share of such validation photos that are named wrongly."""
    photos = shots.validation
    paths, names = [Path(p.path) for p in photos], [photo.class_name for photo in photos]
    said = shots.probabilities(shots.trained(shots.trainer(what), 0), paths).argmax(1).tolist()
    errors: dict[tuple[str, str, str], list[bool]] = {}
    for name, label, context in zip(names, said, shots.contexts_seen(paths, names), strict=True):
        if context:
            for attribute in ("background", "pose"):
                key = (name, attribute, getattr(context, attribute))
                errors.setdefault(key, []).append(shots.task.classes[label] != name)
    return {key: (sum(wrong) + 1) / (len(wrong) + 2) for key, wrong in errors.items()}


# --- what is learned of them ---------------------------------------------------------------------


def autoencoded(shots: FewShot) -> TrainingSet:
    """The real photos twice, the second time as the base model's autoencoder returns them.

    So being soft tells no class. To be run with half the epochs, for as many steps.
    """
    pixels = read_pictures(shots.real.paths)
    rebuilt = (reconstructed(shots.base_model, pixels) * 127.5 + 127.5).round().byte()
    folder = Path("autoencoded")
    folder.mkdir(exist_ok=True)
    paths = []
    for number, picture in enumerate(rebuilt.permute(0, 2, 3, 1).numpy()):
        paths.append(folder / f"{number:04d}.png")
        Image.fromarray(picture).save(paths[-1])
    soft = Labelled(tuple(paths), tuple(map(sha256, paths)), shots.real.labels)
    images = shots.bobs_images()
    return TrainingSet(together(shots.real, soft), images.labelled, images=images)


def soft_labels(shots: FewShot) -> TrainingSet:
    """What classifiers that have not seen an image say of it, half, and what was asked for, half.

    Nothing is dropped: see the filters.
    """
    images = shots.bobs_images()
    said = cross_fitted(shots, images, seeds=(0, 1, 2))
    asked = torch.nn.functional.one_hot(
        torch.tensor(images.labelled.labels), len(shots.task.classes)
    )
    return TrainingSet(shots.real, images.labelled, soft=rounded((said + asked) / 2), images=images)


# --- plans ---------------------------------------------------------------------------------------


def _counts(shots: FewShot) -> dict[str, int]:
    """How many images of each class BOB has."""
    return generate.images_by_class(
        shots.task.classes,
        (entry.class_name for entry in shots.bank),
        shots.generating.images_per_class,
    )


def _in_contexts(shots: FewShot, contexts: Mapping[str, Sequence[Context]]) -> Images:
    """An image of each class in each of its contexts, in order, from the noise that BOB's have."""
    most = max(map(len, contexts.values()))
    plain = generate.plan(
        shots.task,
        shots.bank,
        source="none",
        images_per_class=most,
        seed=shots.generating.seed,
        common={},
    )

    def plan(common: Mapping[str, object]) -> list[Generated]:
        planned = []
        for image in plain:
            own = contexts[image.class_name]
            if image.number < len(own):
                context = own[image.number]
                text = prompt(shots.task.descriptor, image.class_name, context)
                recipe = item_key(**common, prompt=text, seed=image.seed)
                planned.append(replace(image, context=context, prompt=text, recipe=recipe))
        return planned

    return shots.generated(plan)


def _of_bank(
    shots: FewShot,
    pool: Sequence[Entry],
    *,
    task: Task | None = None,
    trained_with: Sequence[Entry] = (),
) -> Images:
    """BOB's plan with contexts drawn from another bank; labels are places in the task's classes."""
    task, settings = task or shots.task, shots.generating
    return shots.generated(
        lambda common: generate.images_of(task, pool, settings, common),
        task.classes,
        trained_with,
    )
