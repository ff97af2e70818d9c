"""Variants of the method against BOB at equal cost, on the miniature.

    python -m bench.arms [ARM...] --seeds 0-9 [--classifier-seeds 3] [--minutes M]
    python -m bench.arms ARM... --verdict
    python -m bench.arms --page

What wins may become a parameter of bob; what loses stays here, with its figures in docs/log.md. An
ARM is a name of `--list`, a pattern of names, or a search. Arms can be told settings, as in
`bob:classify.real_weight=0.3,generate.steps=10` or `filter-*:smoothing=0.1`, with what
`params.yaml` knows and with augment, smoothing, solver, spacing, low and high. Missing rows are
measured, data seed after data seed, each by all arms, and added to bench/results/arms.csv one by
one: killed, the same command goes on.

Data seeds 0 to 9 are for tuning, where only validation is measured. `--verdict` measures arms, and
BOB, on 21 to 30, and on test, once; several processes can have some of these seeds each.
"""

import contextlib
import fnmatch
import hashlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from bench import (
    arms_critics,
    arms_filters,
    arms_sampling,
    arms_sets,
    arms_task,
    arms_training,
    generated_classes,
)
from bench.arms_page import page, write_page
from bench.arms_results import (
    BOB,
    JUDGED_BY,
    RESULTS,
    TUNING,
    VERDICT,
    Row,
    add_row,
    by_arm,
    check_not_judged,
    check_seeds,
    read_rows,
)
from bench.arms_search import SEARCHES, named
from bench.arms_task import (
    FewShot,
    Options,
    TrainingSet,
    context_leakage,
    few_shot_project,
    read_values,
)
from bob.cache.recipe import bare, item_key, maker_of
from bob.commands.configuration import MODELS
from bob.errors import BobError
from bob.formats.files import sha256
from bob.formats.params import PARAMS, read_yaml
from bob.formats.presets import nearest
from bob.models import finetuning, sampling, training

DATADREAM = {"finetune.context": "none", "generate.context": "none"}
BOBS = {"classify.real_weight": 0.5, "generate.guidance_scale": 3.0, "generate.steps": 20}
"""What all arms are told first, as `params.yaml` had it when the first of them were measured: so a
default that moves makes no other arm of one that has rows."""

HARNESS = (arms_task, arms_training, arms_sampling, arms_critics, generated_classes)
# Read now: a file that is edited during a long run is not what has measured.
SOURCES = {
    one.__name__: bare(inspect.getsource(one)) for one in (*HARNESS, arms_sets, arms_filters)
}


@dataclass(frozen=True)
class Arm:
    """A variant of the method."""

    name: str
    about: str
    """What it changes."""
    make: Callable[[FewShot], TrainingSet]
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Params (section.key) and options."""

    @property
    def params(self) -> dict[str, Any]:
        return {key: value for key, value in self.changes.items() if "." in key}

    @property
    def options(self) -> Options:
        own = {key: value for key, value in self.changes.items() if "." not in key}
        return Options().changed(own, self.name)

    @cached_property
    def values(self) -> dict[str, Any]:
        """`params.yaml` with its changes; to be asked for first in the workspace."""
        return read_values(BOBS | self.params, self.name)

    @cached_property
    def code(self) -> str:
        """Short hash of what decides its figures: module, harness, bob's makers, the models."""
        makers = [
            maker_of(one.MADE_BY, one.LIBRARIES).id for one in (training, sampling, finetuning)
        ]
        sources = [SOURCES[self.make.__module__], *(SOURCES[one.__name__] for one in HARNESS)]
        models = [_weights(Path(self.values[section][key])) for section, key in MODELS]
        return hashlib.sha256(repr([*sources, *makers, *models]).encode()).hexdigest()[:12]


@cache
def _weights(folder: Path) -> str:
    """Hash of a model's weights."""
    return item_key(weights=[sha256(path) for path in sorted(folder.rglob("*.safetensors"))])


def _filters(of: str, changes: Mapping[str, Any]) -> list[Arm]:
    return [
        Arm(
            f"{of}filter-{critic}-{percent}",
            f"the worst {percent} % of each class dropped, by the critic {critic}",
            arms_filters.filtered(critic, percent),
            changes,
        )
        for critic in arms_critics.CRITICS
        for percent in arms_filters.SHARES
    ]


def _costs() -> list[Arm]:
    """Samplers at several numbers of steps."""
    kinds: dict[str, dict[str, str]] = {
        "dpm": {},
        "karras": {"spacing": "karras"},
        "unipc": {"solver": "unipc"},
        "ays": {"solver": "ays"},
    }
    return [
        Arm(
            f"steps-{kind}-{steps}",
            f"{steps} steps of {kind}",
            arms_sets.bob,
            {"generate.steps": steps, **options},
        )
        for steps in (6, 8, 10, 12, 15, 20)
        for kind, options in kinds.items()
    ]


_ALL = [
    Arm(BOB, "the method by its first parameters here", arms_sets.bob),
    Arm("real", "real photos only", arms_sets.real),
    Arm("datadream", "no context, neither in training nor in generation", arms_sets.bob, DATADREAM),
    Arm("again", "the real photos again in place of synthetic images", arms_sets.again),
    Arm("shuffled", "BOB's images, labels shuffled within the family", arms_sets.shuffled),
    Arm("foreign", "images of other aircraft, labelled with the task's", arms_sets.foreign),
    Arm("drawn", "the synthetic images by the true renderer: the ceiling", arms_sets.drawn),
    Arm("balanced", "every class has each context equally often", arms_sets.balanced),
    Arm("recombined", "background and pose drawn apart", arms_sets.recombined),
    Arm(
        "autoencoded",
        "the real photos also as the autoencoder returns them, as many steps",
        arms_sets.autoencoded,
        {"classify.epochs": 100},
    ),
    Arm(
        "degraded",
        "sharpness and grain of all images, real and synthetic, as chance has it",
        arms_sets.bob,
        {"augment": "degrade"},
    ),
    Arm(
        "where-needed",
        "half of the images where validation errs, of whose photos it knows class and context",
        arms_sets.where_needed,
    ),
    Arm("soft-labels", "labels half by cross-fitted classifiers", arms_sets.soft_labels),
    Arm(
        "middle-guidance",
        "guidance only at noise levels of 0.3 to 5",
        arms_sets.bob,
        {"low": 0.3, "high": 5.0},
    ),
    Arm("clusters", "contexts are clusters of the photos' borders, poses none", arms_sets.clusters),
    *_filters("", {}),
    *_filters("datadream-", DATADREAM),
    *_costs(),
]
ARMS: Mapping[str, Arm] = {arm.name: arm for arm in _ALL}


def arm_of(name: str) -> Arm:
    """The arm of a name, with its settings; raises BobError for one that there is not.

    In whatever order they are told, the arm has one name.
    """
    base, _, told = name.partition(":")
    if base not in ARMS:
        raise BobError(f"there is no arm {base}; {nearest(base, [*ARMS, *SEARCHES])}")
    arm, settings = ARMS[base], dict[str, str]()
    for setting in filter(None, told.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise BobError(f"{name}: {setting} is no setting; write key=value")
        settings[key] = value
    changes = {key: YAML(typ="safe").load(value) for key, value in settings.items()}
    arm = Arm(named(base, settings), arm.about, arm.make, {**arm.changes, **changes})
    _ = arm.values, arm.options  # which may raise
    return arm


def names_of(
    asked: Sequence[str], rows: Sequence[Row], seeds: Sequence[int], classifiers: Sequence[int]
) -> list[str]:
    """The arms that are to be measured now, BOB first; see `Search.arms`."""
    names = {BOB: None}
    for one in asked or list(ARMS):
        if one in SEARCHES:
            names |= dict.fromkeys(SEARCHES[one].arms(by_arm(rows), seeds, classifiers))
        else:
            base, colon, told = one.partition(":")
            found = fnmatch.filter(ARMS, base) or [base]
            names |= {arm_of(f"{name}{colon}{told}").name: None for name in found}
    return list(names)


def measure(arm: Arm, data_seed: int, classifiers: Sequence[int], results: Path) -> list[Row]:
    """Add a row for each classifier seed; the current folder is a project of the data seed.

    Test is measured only where nothing is tuned.
    """
    began = time.monotonic()
    shots = FewShot(arm.values, arm.options, data_seed)
    what = arm.make(shots)
    trainer = shots.trainer(what)
    made = time.monotonic()
    figures = dict(what.figures)
    if what.images:
        # A filter's is the finding, for which all images are asked about; else a sample will do.
        whole = len(what.images) if figures else arm.values["audit"]["captioned_per_class"]
        figures |= shots.leakage(what.images, whole)
        shown = what.images.labelled
        true = context_leakage(shown.labels, arms_critics.true_contexts(shown.paths))
        figures |= {f"true_{name}": value for name, value in true.items()}
    began += time.monotonic() - made  # to look at the images is no cost of the arm
    rows = []
    for number in classifiers:
        weights = shots.trained(trainer, number, with_synthetic=len(what.synthetic) > 0)
        row = Row(
            arm.name,
            data_seed,
            number,
            arm.code,
            val_top1=shots.validated(weights),
            test_top1=shots.tested(weights) if data_seed in VERDICT else math.nan,
            images=len(what.synthetic),
            evaluations=shots.evaluations,
            seconds=time.monotonic() - began,
            **figures,
        )
        add_row(row, results)
        rows.append(row)
        began = time.monotonic()
    return rows


@dataclass(frozen=True)
class Call:
    """What one call is to measure."""

    asked: Sequence[str]
    seeds: Sequence[int]
    classifiers: Sequence[int]
    until: float
    """Of time.monotonic(); later, nothing is begun."""
    again: bool
    """Whether what other code has measured of the arms asked for is measured anew."""
    results: Path

    def missing(self) -> list[tuple[int, Arm, list[int]]]:
        """Data seed, arm and classifier seeds; the first data seed by all arms, then the next."""
        rows = read_rows(self.results)
        arms = [arm_of(name) for name in names_of(self.asked, rows, self.seeds, self.classifiers)]
        done = {
            (row.arm, row.data_seed, row.classifier_seed): row.code == arm.code or not self.again
            for arm in arms
            for row in rows
            if row.arm == arm.name
        }
        missing = []
        for seed in self.seeds:
            for arm in arms:
                left = [n for n in self.classifiers if not done.get((arm.name, seed, n))]
                if left:
                    missing.append((seed, arm, left))
        return missing

    def run(self) -> None:
        """Measure what is missing; a search may then want more."""
        while missing := self.missing():
            for seed in dict.fromkeys(seed for seed, _, _ in missing):
                own = [(arm, left) for other, arm, left in missing if other == seed]
                with few_shot_project(read_yaml(PARAMS), seed):
                    for arm, left in own:
                        if time.monotonic() > self.until:
                            click.echo("out of time; the same command goes on")
                            return
                        _tell(measure(arm, seed, left, self.results))


def _tell(rows: Sequence[Row]) -> None:
    """Never test: a verdict is read when it is complete."""
    accuracy = ", ".join(f"{row.val_top1:.1f}" for row in rows)
    seconds = sum(row.seconds for row in rows)
    first = rows[0]
    click.echo(
        f"{first.arm}, data seed {first.data_seed}: {accuracy} on validation, {seconds:.0f} s"
    )


def seeds_of(text: str) -> list[int]:
    """`0-4,7` -> 0, 1, 2, 3, 4, 7."""
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise BobError(f"--seeds {text}: no seeds; write such as 0-4,7") from None
    return seeds


def told_page(rows: Sequence[Row]) -> str:
    """The page of all rows."""
    arms = {}
    for name in dict.fromkeys(row.arm for row in rows):
        with contextlib.suppress(BobError):  # of an arm that there is no more
            arms[name] = arm_of(name)
    about = {name: arm.about for name, arm in arms.items()}
    return page(rows, about, {name: arm.code for name, arm in arms.items()})


@click.command(help=__doc__)
@click.argument("arms", nargs=-1)
@click.option("--seeds", default=None, help="Data seeds, by default all that are for it.")
@click.option("--classifier-seeds", default=len(JUDGED_BY), help="How many under each.")
@click.option("--minutes", default=math.inf, help="After which no arm is begun.")
@click.option("--again", is_flag=True, help="Measure anew what other code has measured.")
@click.option("--verdict", is_flag=True, help="On data seeds 21 to 30 and on test, once an arm.")
@click.option("--page", "page_only", is_flag=True, help="Only write and print the page.")
@click.option("--list", "listed", is_flag=True, help="Only print the arms.")
@click.pass_context
def main(context: click.Context, **_: Any) -> None:
    try:
        _main(**context.params)
    except BobError as error:
        raise click.ClickException(str(error)) from None


def _main(
    arms: Sequence[str],
    seeds: str | None,
    classifier_seeds: int,
    minutes: float,
    again: bool,
    verdict: bool,
    page_only: bool,
    listed: bool,
) -> None:
    if listed:
        named = {name: one.about for kind in (ARMS, SEARCHES) for name, one in kind.items()}
        width = max(map(len, named)) + 2
        click.echo("\n".join(f"{name:<{width}}{about}" for name, about in named.items()))
        return
    if not page_only:
        until = time.monotonic() + 60 * minutes
        results = RESULTS.absolute()
        allowed = VERDICT if verdict else TUNING
        wanted = seeds_of(seeds) if seeds else allowed
        check_seeds(wanted, allowed)
        if verdict:
            _check_verdict(arms, results, again)
            classifiers = JUDGED_BY
        else:
            classifiers = range(classifier_seeds)
        Call(arms, wanted, classifiers, until, again, results).run()
    text = told_page(read_rows())
    write_page(text)
    click.echo(text)


def _check_verdict(arms: Sequence[str], results: Path, again: bool) -> None:
    """Raises BobError for a verdict that is none: of arms that were not named, or a second one."""
    if not arms or any(
        name in SEARCHES or fnmatch.filter(ARMS, name) != [name] for name in arms if ":" not in name
    ):
        raise BobError("--verdict is for arms that are named one by one")
    if again:
        raise BobError("--verdict is given once: no --again")
    chosen = map(arm_of, arms)
    judged = {arm.name: arm.code for arm in chosen if arm.name != BOB}
    check_not_judged(judged, by_arm(read_rows(results)))


if __name__ == "__main__":
    main()
