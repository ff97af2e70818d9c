"""What a decision costs, before it is saved: by the accounting of `bob plan`.

Compared is what a run would make as things are with what it would make after the decision: first
with the captions changed, which may lead to another LoRA and so to other images, then with the
verdicts too.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bob.cache.executors.chosen import executor
from bob.cache.items import tree_hash
from bob.commands.look import captions
from bob.commands.look.review import Changes
from bob.commands.plan import Machine, duration, forecast_of, project_of
from bob.commands.plan.work import (
    Project,
    cached_lora,
    fine_tuning_work,
    generating_work,
    missing_classifiers,
    planned_images,
    training_work,
)
from bob.dvc.forecast import RESTORED, UP_TO_DATE
from bob.dvc.pipeline import Pipeline
from bob.formats import layout, params
from bob.formats.manifest import Generated
from bob.formats.params import PARAMS, Params
from bob.formats.prompts import Entry, read_bank
from bob.formats.review import KEEP, REJECT, Verdict, read_verdicts, rejections
from bob.models import gpus
from bob.models.lora import LORA_FILE
from bob.models.training import Labelled
from bob.stages.audit import first_of_each_class
from bob.stages.caption import entries_of
from bob.stages.finetune import training_captions

Verdicts = Mapping[str, Verdict | None]

_hashes: dict[str, str] = {}  # object -> SHA-256: thousands of images are not read at each question


@dataclass(frozen=True)
class Outcome:
    """What a run would use and make."""

    bank: Sequence[Entry] | None
    """None where the captions are being made."""
    trains_lora: bool
    images: Sequence[Generated] | None
    """None where the LoRA is not there yet, by which images are known."""
    missing: Sequence[Generated] = ()
    """Those of the images that are to be made."""
    known: Mapping[str, str] = field(default_factory=dict)
    """Recipe -> object of the other images."""


def cost(changes: Changes, verdicts: Verdicts) -> list[str]:
    """What the changes cost, in lines; `verdicts` are those of the changes, with their images.

    Raises BobError where something that the plan is made of is missing.
    """
    if not changes.captions and not verdicts:
        return []
    of = Params(params.load(), "look")
    with Pipeline() as pipeline:
        forecast = forecast_of(pipeline, of)
        machine = Machine(gpus.choose(None), executor().workers())
        with project_of(of, forecast, machine.gpu) as project:
            return _lines(project, machine, changes, verdicts)


def _lines(project: Project, machine: Machine, changes: Changes, verdicts: Verdicts) -> list[str]:
    if not project.photos.known:
        return ["what it costs is known when the photos are drawn: `dvc repro split`"]
    saved = read_verdicts()
    before = middle = _as_it_is(project, rejections(saved.values()))
    lines = []
    if changes.captions:
        middle = _outcome(project, _edited(project, changes), rejections(saved.values()))
        lines += _of_captions(project, machine, len(changes.captions), before, middle)
    after = middle
    if verdicts:
        decided = {recipe: one for recipe, one in {**saved, **verdicts}.items() if one is not None}
        after = _outcome(project, middle.bank, rejections(decided.values()))
        made = _made(project, machine, middle, after)
        if after.images is None:
            made = "of no effect, as another LoRA will make other images"
        lines.append(f"{_decisions(saved, verdicts)}: {made}")
    return [*lines, *_later(project, machine, before, after)]


def _as_it_is(project: Project, rejected: Collection[str]) -> Outcome:
    """Without a decision: nothing is made by a stage that will not run."""
    outcome = _outcome(project, _bank(project), rejected)
    idle = project.forecast.file(layout.GENERATED) is not None
    return replace(outcome, missing=()) if idle else outcome


def _bank(project: Project) -> Sequence[Entry] | None:
    """The captions of the shots as they are or will be; None where they are to be made."""
    source, photos = project.params.caption.bank, project.photos
    if source != captions.CAPTIONER:
        return entries_of(photos.train, Path(source))
    path = project.forecast.file(layout.BANK)
    return None if path is None else read_bank(path)


def _edited(project: Project, changes: Changes) -> Sequence[Entry]:
    """The captions of the shots after the changes are saved."""
    photos, path = project.photos.train, captions.bank_file(params.load())
    entries = {one.image: one for one in captions.edited(path, changes.captions, photos)}
    return [entries[photo.sha256] for photo in photos]


def _outcome(project: Project, bank: Sequence[Entry] | None, rejected: Collection[str]) -> Outcome:
    lora = None if bank is None else _lora(project, bank)
    if bank is None or lora is None:
        return Outcome(bank, True, None)
    images, wanted = planned_images(project, bank, lora, rejected)
    known = project.cache.known(wanted)
    missing = [image for image in images if image.recipe not in known]
    return Outcome(bank, False, images, missing, known)


def _lora(project: Project, bank: Sequence[Entry]) -> str | None:
    """Content hash of the LoRA of these captions; None where it is to be trained."""
    files, recorded = project.forecast.files(layout.LORA), project.forecast.file(layout.BANK)
    photos, context = project.photos, project.params.finetune.context
    if files is not None and recorded is not None:
        used, now = (
            training_captions(photos.task, photos.train, one, context)
            for one in (read_bank(recorded), bank)
        )
        if used == now:
            return tree_hash(files)
    oid = cached_lora(project, bank)
    return tree_hash({LORA_FILE: oid}) if oid else None


def _retrained(project: Project, before: Outcome, after: Outcome) -> list[tuple[str, int]]:
    """(Variant, seed) of the classifiers that the second outcome trains and the first does not."""
    if before.images is not None and before.images == after.images:
        return []
    trained = set()
    if project.forecast.states["classify"] not in (UP_TO_DATE, RESTORED):
        trained = set(missing_classifiers(project, _labelled(project, before))[0])
    new, _ = missing_classifiers(project, _labelled(project, after))
    return [one for one in new if one not in trained]


def _labelled(project: Project, outcome: Outcome) -> Labelled | None:
    """The set of images, by their objects; None where one is not here to be read."""
    images, classes = outcome.images or (), project.photos.task.classes
    oids = [outcome.known.get(image.recipe) for image in images]
    if outcome.images is None or not all(oid and project.cache.exists(oid) for oid in oids):
        return None
    return Labelled(
        tuple(layout.GENERATE / image.file for image in images),
        tuple(_sha256(project, oid) for oid in oids if oid),
        tuple(classes.index(image.class_name) for image in images),
    )


def _sha256(project: Project, oid: str) -> str:
    if oid not in _hashes:
        _hashes[oid] = hashlib.sha256(project.cache.read(oid)).hexdigest()
    return _hashes[oid]


# --- in words ------------------------------------------------------------------------------------


def _decisions(saved: Mapping[str, Verdict], verdicts: Verdicts) -> str:
    """What the verdicts change: "rejecting 37, taking back 2"."""
    steps = [
        (saved[recipe].verdict if recipe in saved else None, one.verdict if one else None)
        for recipe, one in verdicts.items()
    ]
    counts = {
        "rejecting": sum(new == REJECT != old for old, new in steps),
        "taking back": sum(old == REJECT != new for old, new in steps),
        "keeping": sum(new == KEEP != old for old, new in steps),
    }
    said = [f"{word} {count:,}" for word, count in counts.items() if count]
    return ", ".join(said) or "these verdicts"


def _of_captions(
    project: Project, machine: Machine, count: int, before: Outcome, after: Outcome
) -> list[str]:
    what = f"{count:,} caption{'s' if count > 1 else ''}"
    lines = [f"{what}: {_made(project, machine, before, after)}"]
    if project.params.caption.bank == captions.CAPTIONER:
        path = captions.bank_file(params.load()).as_posix()
        lines.append(f"{PARAMS}: caption.bank becomes {path}, with the captions of all shots")
    return lines


def _made(project: Project, machine: Machine, before: Outcome, after: Outcome) -> str:
    """What the second outcome makes that the first does not: "37 new images, about 20 s"."""
    parts, seconds = [], 0.0
    if after.trains_lora and not before.trains_lora:
        parts.append("1 fine-tuning")
        seconds += fine_tuning_work(project).seconds(machine.gpu, machine.count)
    if after.images is None:
        prompts, cached = None, 0
        count = project.images if before.images is not None else 0
    else:
        made = {image.recipe for image in before.missing}
        new = [image for image in after.missing if image.recipe not in made]
        had = {image.recipe for image in (*(before.images or ()), *after.missing)}
        prompts, count = [image.prompt for image in new], len(new)
        cached = sum(image.recipe not in had for image in after.images)
    if count:
        parts.append(f"{count:,} new image{'s' if count > 1 else ''}")
        seconds += generating_work(project, prompts).seconds(machine.gpu, machine.count)
    if cached:
        parts.append(f"{cached:,} from the cache")
    if not seconds:
        return ", ".join(["nothing is made", *parts])
    return ", ".join([*parts, _about(seconds, machine)])


def _later(project: Project, machine: Machine, before: Outcome, after: Outcome) -> list[str]:
    """What follows for the stages after generate."""
    lines = []
    if retrained := _retrained(project, before, after):
        seconds = training_work(project, retrained, True).seconds(machine.gpu, machine.count)
        many = "classifier is" if len(retrained) == 1 else "classifiers are"
        lines.append(f"then {len(retrained):,} {many} trained again, {_about(seconds, machine)}")
    asked = project.params.audit.captioned_per_class
    if after.images is not None:
        known = {one.recipe for one in first_of_each_class(before.images or (), asked)}
        others = [
            one for one in first_of_each_class(after.images, asked) if one.recipe not in known
        ]
        if others:
            lines.append(f"and the audit asks the captioner about {len(others):,} other images")
    return lines


def _about(seconds: float, machine: Machine) -> str:
    """As `bob plan` says it, which takes an h100 where it does not know the machine."""
    on = machine.gpu.name if machine.count == 1 else f"{machine.count} x {machine.gpu.name}"
    return f"{'less than 1 s' if seconds < 1 else f'about {duration(seconds)}'} on {on}"
