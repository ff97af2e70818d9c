"""A few-shot task of the miniature and what the pipeline makes of it, for the arms of `bench.arms`.

The stages are bob's own, in a scratch project whose cache is the workspace's: what two arms, or an
arm and a study, both want is made once, and no result of the workspace is touched.
"""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from bench.arms_sampling import SOLVERS, ArmMaker
from bench.arms_training import AUGMENTATIONS, ArmTrainer, chosen
from bob.cache.items import ItemCache
from bob.cache.work import Work
from bob.commands.study.drawn import sandbox
from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import sha256
from bob.formats.manifest import Generated
from bob.formats.params import PARAMS, Params, read_yaml
from bob.formats.photos import Photo, Task, read_photos, read_task
from bob.formats.presets import nearest, overridden
from bob.formats.prompts import ATTRIBUTES, Context, Entry, read_bank, write_bank
from bob.models import sampling
from bob.models.backbones import Backbone, open_backbone, predict
from bob.models.classifiers import REAL_AND_SYNTHETIC, REAL_ONLY, read_history
from bob.models.device import computing_device
from bob.models.preprocessing import read_inputs
from bob.models.training import Labelled
from bob.stages import caption, classify, draw, finetune, generate, split

SECTIONS = ("finetune", "generate", "classify")
"""Of the params, what an arm may change: the task is the same for all."""

ALLOWED = {"augment": tuple(AUGMENTATIONS), "solver": ("", *SOLVERS), "spacing": ("", "karras")}


@dataclass(frozen=True)
class Options:
    """What an arm may be told that `params.yaml` does not know."""

    augment: str = "none"
    smoothing: float = 0.0
    solver: str = ""
    spacing: str = ""
    low: float = 0.0
    high: float = math.inf

    def changed(self, changes: Mapping[str, Any], where: str) -> "Options":
        """With these values; raises BobError naming `where` for what is none."""
        for name, value in changes.items():
            if name not in {one.name for one in fields(self)}:
                known = [one.name for one in fields(self)]
                raise BobError(f"{where}: {name} is no option; {nearest(name, known)}")
            allowed = ALLOWED.get(name)
            if allowed and value not in allowed:
                raise BobError(f"{where}: {name} is {value!r}; allowed: {', '.join(allowed)}")
            if not allowed and not isinstance(value, int | float):
                raise BobError(f"{where}: {name} is {value!r}; allowed: a number")
        told = replace(self, **changes)
        if told.solver == "ays" and told.spacing:
            raise BobError(f"{where}: the solver ays has timesteps of its own; leave spacing out")
        return told


@dataclass(frozen=True)
class Images:
    """Generated images, in the order of training."""

    about: tuple[Generated, ...]
    labelled: Labelled

    def __len__(self) -> int:
        return len(self.about)


@dataclass(frozen=True)
class TrainingSet:
    """What an arm trains classifiers on."""

    real: Labelled
    synthetic: Labelled = field(default_factory=lambda: Labelled((), (), ()))
    soft: Tensor | None = None
    """Targets [N, classes] of the synthetic images, in place of their labels."""
    images: Images | None = None
    """The generated images that are among the synthetic ones, for what is said of them."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else the arm has found out."""


@contextlib.contextmanager
def few_shot_project(values: Mapping[str, Any], data_seed: int) -> Iterator[None]:
    """A scratch project as the current folder, with data, split and caption bank of a data seed."""
    values = overridden({"data.seed": data_seed}, str(PARAMS), values)
    if values["data"]["name"] != "miniature":
        raise BobError(
            "data.name: bench.arms is for the miniature, the only set with true pictures"
        )
    kept = Path("build").absolute()
    kept.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(io.StringIO()):  # DVC says that there is a repository
            folder = stack.enter_context(sandbox(values))
        stack.enter_context(contextlib.chdir(folder))
        Path("build").symlink_to(kept)  # the workspace's, for what no item cache has
        for stage in (draw, split, caption):
            _run(stage, values)
        yield


def read_values(changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`params.yaml` of the current folder with an arm's changes; raises BobError for others."""
    for key in changes:
        if key.partition(".")[0] not in SECTIONS:
            raise BobError(f"{where}: {key} is not an arm's to change; of {', '.join(SECTIONS)}")
    return overridden(changes, where, read_yaml(PARAMS))


def _run(stage: Any, values: Mapping[str, Any]) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        stage.run(_params(stage, values))


def _params(stage: Any, values: Mapping[str, Any]) -> Params:
    return Params(values, stage.__name__.rpartition(".")[2])


class FewShot:
    """The task in the current folder, under an arm's params and options."""

    def __init__(self, values: Mapping[str, Any], options: Options, data_seed: int) -> None:
        self.values, self.options, self.data_seed = values, options, data_seed
        self._evaluations: dict[str, int] = {}

    # --- what is given ---------------------------------------------------------------------------

    @cached_property
    def task(self) -> Task:
        return read_task()

    @cached_property
    def real(self) -> Labelled:
        """The shots."""
        return classify.labelled(read_photos(layout.TRAIN), self.task)

    @cached_property
    def validation(self) -> list[Photo]:
        return read_photos(layout.VAL)

    @cached_property
    def bank(self) -> list[Entry]:
        return read_bank(layout.BANK)

    @cached_property
    def backbone(self) -> Backbone:
        return open_backbone(self.values["classify"]["backbone"])

    @property
    def base_model(self) -> Path:
        return Path(self.values["finetune"]["base_model"])

    @property
    def seeds(self) -> list[int]:
        """For an arm's own chance, which is another under each data seed."""
        return [self.generating.seed, self.data_seed]

    @property
    def generating(self) -> Any:
        """The parameters of generate, as the stage takes them."""
        return _params(generate, self.values).generate

    @property
    def evaluations(self) -> int:
        """How often the UNet was asked, or would have been, for all images up to now."""
        return sum(self._evaluations.values())

    # --- images ----------------------------------------------------------------------------------

    def bobs_images(self) -> Images:
        """What the pipeline generates under the params."""
        return self.generated(
            lambda common: generate.images_of(self.task, self.bank, self.generating, common)
        )

    def generated(
        self,
        plan: Callable[[Mapping[str, object]], Sequence[Generated]],
        classes: Sequence[str] = (),
        bank: Sequence[Entry] = (),
    ) -> Images:
        """The images of a plan, by the LoRA of the params.

        A plan is called with what decides an image beside prompt and seed. Labels are places in
        `classes`, by default the task's. The LoRA is trained with the contexts of `bank`, by
        default the captioner's.
        """
        self._finetune(bank or self.bank)
        settings = self.generating
        maker = ArmMaker(
            self.base_model,
            layout.LORA,
            **generate.maker_options(settings),
            solver=self.options.solver,
            spacing=self.options.spacing,
            interval=(self.options.low, self.options.high),
        )
        with ItemCache("generate") as cache:
            common = generate.decided_by(
                cache, self.base_model, cache.content_hash(layout.LORA), maker
            )
            planned = list(plan(common))

            def inputs(numbers: list[int]) -> tuple[list[str], list[int]]:
                batch = [planned[number] for number in numbers]
                return [image.prompt for image in batch], [image.seed for image in batch]

            work = Work(maker.make, inputs, sampling.png, elsewhere=False)
            wanted = generate.images_wanted(common, planned)
            rows = cache.take(wanted, work, settings.batch_size, "generating")
            paths = [_placed(cache, row.oid, Path(f"images/{row.oid}.png")) for row in rows]
        each = maker.evaluations
        self._evaluations |= {image.recipe: each for image in planned}
        names = list(classes or self.task.classes)
        labels = tuple(names.index(image.class_name) for image in planned)
        return Images(tuple(planned), Labelled(tuple(paths), tuple(map(sha256, paths)), labels))

    def _finetune(self, bank: Sequence[Entry]) -> None:
        """The LoRA into its place, from the item cache where it has been trained before."""
        write_bank(layout.BANK, bank)
        _run(finetune, self.values)
        write_bank(layout.BANK, self.bank)

    # --- classifiers -----------------------------------------------------------------------------

    def trainer(self, what: TrainingSet) -> ArmTrainer:
        """What trains on a set by the params' recipe."""
        return ArmTrainer(
            self.backbone,
            self.task,
            classify.recipe_of(_params(classify, self.values).classify),
            real=what.real,
            synthetic=what.synthetic,
            validation=classify.labelled(self.validation, self.task),
            augment=self.options.augment,
            smoothing=self.options.smoothing,
            soft=what.soft,
        )

    def trained(self, trainer: ArmTrainer, seed: int, with_synthetic: bool = True) -> Path:
        """The weights of one classifier, from the item cache where it has been trained before."""
        folder = Path(self.values["classify"]["backbone"])
        variant = REAL_AND_SYNTHETIC if with_synthetic else REAL_ONLY
        with ItemCache("classify") as cache:
            wanted = classify.classifiers_wanted(cache, folder, trainer, variant, [seed])

            def inputs(_: list[int]) -> tuple[bool, int, str]:
                return with_synthetic, seed, f"seed {seed}"

            work = Work(trainer.make, inputs, elsewhere=False)
            (row,) = cache.take(wanted, work, 1, "training")
            return _placed(cache, row.oid, Path(f"classifiers/{row.oid}.safetensors"))

    def validated(self, weights: Path) -> float:
        """Top-1 on validation in percent, of the epoch that was kept."""
        return float(read_history(weights)["result"]["top1"])

    def tested(self, weights: Path) -> float:
        """Top-1 on test in percent."""
        photos = classify.labelled(read_photos(layout.TEST), self.task)
        named = self.probabilities(weights, photos.paths).argmax(1)
        return 100 * (named == torch.tensor(photos.labels)).double().mean().item()

    def probabilities(self, weights: Path, images: Sequence[Path]) -> Tensor:
        """What a classifier says of images: float32 [N, classes]."""
        rank = self.values["classify"]["lora_rank"]
        network = self.backbone.classifier(self.backbone.trainable(self.task, rank))
        network.load_state_dict(load_file(weights))
        inputs = read_inputs(images, self.backbone.preprocessing)
        return predict(network.eval(), inputs, computing_device()).softmax(1)

    # --- contexts --------------------------------------------------------------------------------

    def contexts_seen(self, images: Sequence[Path], names: Sequence[str]) -> list[Context | None]:
        """What the captioner sees in images of these classes; None: no usable answer."""
        photos = [
            Photo(path.as_posix(), name, sha256(path))
            for path, name in zip(images, names, strict=True)
        ]
        with ItemCache("audit") as cache:
            ask = caption.cached_ask(cache, _params(caption, self.values).caption)
            found = [caption.accepted_answers(ask, photos, one, self.task) for one in ATTRIBUTES]
        backgrounds, poses = found
        return [
            Context(backgrounds[place], poses[place])
            if place in backgrounds and place in poses
            else None
            for place in range(len(photos))
        ]

    def leakage(self, images: Images, per_class: int) -> dict[str, float]:
        """Leakage by what the captioner sees, of the first `per_class` images of each label."""
        count: Counter[int] = Counter()
        places = []
        for place, label in enumerate(images.labelled.labels):
            count[label] += 1
            if count[label] <= per_class:
                places.append(place)
        first = chosen(images.labelled, places)
        names = [self.task.classes[label] for label in first.labels]
        return context_leakage(first.labels, self.contexts_seen(first.paths, names))


def context_leakage(labels: Sequence[int], contexts: Sequence[Context | None]) -> dict[str, float]:
    """How much the contexts of images tell of their labels; None: not known.

    Adjusted mutual information, as in the audit: 1 where the one decides the other, 0 at chance.
    The miniature has few enough phrases to be taken as they are.
    """
    both = [(label, one) for label, one in zip(labels, contexts, strict=True) if one]
    return {
        f"leakage_{attribute}": float(
            adjusted_mutual_info_score(
                [label for label, _ in both], [getattr(one, attribute) for _, one in both]
            )
        )
        for attribute in ATTRIBUTES
    }


def with_contexts(entries: Iterable[Entry], contexts: Iterable[Context]) -> list[Entry]:
    """The entries of a bank with other contexts."""
    pairs = zip(entries, contexts, strict=True)
    return [replace(entry, context=context) for entry, context in pairs]


def _placed(cache: ItemCache, oid: str, path: Path) -> Path:
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        cache.place([oid], [path])
    return path
