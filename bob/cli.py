"""The command line: it validates and dispatches; the work is in the stages' own modules.

Stages are imported when they run, so that `bob --help` does not wait for torch.
"""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import click

from bob.errors import LINE, BobError, shown, tell
from bob.failures import silence
from bob.formats import params

STAGES = {
    "draw": "Draw the embedded miniature dataset into data/miniature.",
    "split": "Draw the shots; set validation and test photos aside.",
    "caption": "Ask the captioner for every shot's background and pose.",
    "finetune": "Fine-tune the text-to-image model on the shots with LoRA.",
    "generate": "Generate the synthetic training set.",
    "classify": "Train classifiers on the real photos, and on real plus synthetic.",
    "evaluate": "Measure the classifiers' accuracy on test.",
    "audit": "Measure the synthetic set: context leakage, diversity, fidelity.",
    "export": "Export the best classifier to ONNX, with a script that uses it.",
    "benchmark": "Measure the ONNX model's accuracy, latency and throughput.",
    "card": "Write the exported classifier's model card.",
    "report": "Write a page to look at the images and the results with.",
}
CACHED = ("caption", "finetune", "generate", "classify", "audit")  # the stages with items


class _Group(click.Group):
    """Prints a BobError as one line, lists commands in the order of the pipeline."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BobError as error:
            raise click.ClickException(str(error)) from None

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Better fine-grained classifiers from a few real photos per class.

    `dvc repro` runs the stages below in order; each can also be run alone from the project root.
    """


def _prepare_libraries() -> None:
    """Set what the libraries read when they are imported."""
    # Models are local folders: nothing in a stage may reach for a hub, or wait for one.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # stages have their own
    warnings.filterwarnings("ignore", module="PIL")  # of photos that it reads all the same
    # Threads that wait for each other must not spin: with another process on the machine, as
    # `dvc exp run --jobs 2` has, spinning makes small networks ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # dvclive tells VS Code of a step by one file in the repository's root. Of experiments that are
    # run at once, one removes it when another is about to, and that one fails. Each gets its own.
    if "DVC_ROOT" in os.environ:
        os.environ["DVC_ROOT"] = str(Path.cwd())
    # By this variable dvclive knows an experiment, and adds the folder it writes to git: a stage's
    # draft, which is gone when it is done, and stands in the way of the next run if it is killed.
    # DVC itself adds what the stage has made, and tells Studio.
    if os.environ.pop("DVC_EXP_BASELINE_REV", None):
        os.environ["DVC_STUDIO_OFFLINE"] = "true"


def _add_stage(name: str, help_line: str) -> None:
    @cli.command(name, help=help_line, short_help=help_line)
    def run_stage() -> None:
        if "DVC_STAGE" in os.environ:
            from bob.commands import configuration
            from bob.parent import die_with_dvc

            die_with_dvc()
            configuration.check(params.load())
        stage_params = params.for_stage(name)
        _prepare_libraries()
        with _printed_afterwards(name):
            importlib.import_module(f"bob.stages.{name}").run(stage_params)


@contextmanager
def _printed_afterwards(stage: str) -> Iterator[None]:
    """Print what a stage says when it has ended; its output is whole where that fails."""
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            yield
    finally:
        try:
            for line in filter(None, said.getvalue().split("\n")):
                click.echo(shown(line, LINE))
        except OSError as error:
            silence(sys.stdout)
            tell(f"{stage}: warning: its output is written, but what it says is not: {error}")


for _name, _help_line in STAGES.items():
    _add_stage(_name, _help_line)


@cli.command()
@click.argument("photos", nargs=-1, required=True, metavar="PHOTO...")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="An exported classifier.  [default: results/export/classifier.onnx]",
)
@click.option(
    "--top", type=click.IntRange(1), default=3, show_default=True, help="How many classes."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "csv", "json"]),
    default="table",
    show_default=True,
)
def predict(photos: tuple[str, ...], model: Path | None, top: int, form: str) -> None:
    """Say of each PHOTO what the exported classifier sees in it.

    PHOTO is a file, a folder, a glob, or - for a list of these on standard input. Exits with status
    1 where one could not be read.
    """
    from bob.commands.predict import predict as predict_photos

    if not predict_photos(photos, model, top, form):
        raise SystemExit(1)


@cli.command()
@click.argument("model", metavar="[ID[@REVISION]]", required=False)
@click.argument("folder", type=click.Path(path_type=Path), metavar="[models/NAME]", required=False)
@click.option("--update", is_flag=True, help="Of models/NAME, or all: what the revision is now.")
@click.option("--list", "listed", is_flag=True, help="Which models are here, and from where.")
def fetch(model: str | None, folder: Path | None, update: bool, listed: bool) -> None:
    """Bring a model from the Hugging Face Hub into models/NAME and track it with DVC.

    REVISION is a branch, a tag, refs/pr/N or a commit; it is resolved to the commit, which the
    folder's .dvc file keeps. What no stage reads is left out. A call that broke off goes on.
    """
    from bob.commands import fetch as fetching

    if model and not (update or listed):
        fetching.fetch(model, folder)
    elif update and not (folder or listed):
        fetching.update(Path(model) if model else None)
    elif listed and not (model or update):
        fetching.list_models()
    else:
        raise click.UsageError("give ID[@REVISION], or --update, or --list")


@cli.command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--yes", is_flag=True, help="Write without asking.")
@click.option("--fetch", "fetch_models", is_flag=True, help="Fetch the models that are missing.")
def use(names: tuple[str, ...], yes: bool, fetch_models: bool) -> None:
    """Write presets into params.yaml, after showing the difference; without a NAME, list them.

    Presets are recipes, models, datasets and methods, in experiments/presets.yaml.
    """
    from bob.commands import use as using

    if names:
        using.use(names, yes=yes, fetch_models=fetch_models)
    else:
        using.list_presets()


@cli.command()
@click.argument("name", type=click.Choice(["aircraft", "cars", "cub", "pets", "flowers"]))
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, path_type=Path),
    help="The archive, or a folder with the published files, packed or not.  [default: download]",
)
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), help="Where to.  [default: data/NAME]"
)
def dataset(name: str, source: Path | None, folder: Path | None) -> None:
    """Bring a public benchmark, with its official split, into data/ and track it with DVC.

    Stanford Cars is no longer published: give its files with --from.
    """
    from bob.commands.datasets import dataset as bring_dataset

    bring_dataset(name, source, folder or Path("data") / name)


@cli.command()
@click.option("--gpu", metavar="NAME", help="By default what makes the items has, or else an h100.")
@click.option(
    "--gpus", type=click.IntRange(1), help="How many.  [default: as many as make the items]"
)
@click.option("--price", type=click.FloatRange(0), help="Of a GPU for an hour.")
@click.option(
    "-S",
    "--set-param",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Plan with another parameter, as `dvc exp run -S` would run; repeatable.",
)
def plan(
    gpu: str | None, gpus: int | None, price: float | None, overrides: tuple[str, ...]
) -> None:
    """Print what `dvc repro` would do and cost, and what of it is there already.

    Runs nothing, and needs of the models only their config files.
    """
    _prepare_libraries()
    from bob.commands.plan import plan as print_plan

    print_plan(gpu, gpus, price, overrides)


@cli.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Of 127.0.0.1.  [default: 8717, or one that is free]",
)
@click.option("--no-browser", is_flag=True, help="Print the URL, and open no browser.")
def look(port: int | None, no_browser: bool) -> None:
    """Serve the report in a browser, to reject images and to edit captions.

    Decisions are files of the project, in data/review and data/contexts; `dvc repro` acts on them.
    Only who has the URL's token can see the page, and only on this machine.
    """
    _prepare_libraries()
    from bob.commands.look import look as serve

    serve(port, browser=not no_browser)


@cli.command()
@click.argument("stages", nargs=-1, metavar="[STAGE]...")
def why(stages: tuple[str, ...]) -> None:
    """Say what makes stages run: the parameter, the file, the function.

    Of all stages, if none is named. Compares with what dvc.lock recorded; runs nothing.
    """
    from bob.commands.why import why as say_why

    say_why(stages)


@cli.command()
@click.argument("stages", nargs=-1, metavar="[STAGE]...")
def verify(stages: tuple[str, ...]) -> None:
    """Check that stages touch what dvc.yaml declares for them, and nothing else.

    Runs each stage (all, if none is named) in a temporary folder that holds only its declared
    dependencies and params. Needs what `dvc repro` makes. Exits with status 1 on a finding.
    """
    from bob.commands.verify import verify as verify_stages

    if not verify_stages(stages):
        raise SystemExit(1)


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), default="experiments/miniature.yaml")
@click.option(
    "--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at the same time."
)
@click.option(
    "--again", is_flag=True, help="Repeat runs of other models or params; of other code a sample."
)
@click.option(
    "--sample",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    metavar="N",
    help="With --again: repeat N runs of other code, and all if one differs; 0: all at once.",
)
@click.option(
    "--only", multiple=True, metavar="NAMES", help="Run these settings ('clip-*'); repeatable."
)
@click.option("--page", "page_only", is_flag=True, help="Run nothing; write the page.")
def study(
    file: Path,
    jobs: int,
    again: bool,
    sample: int,
    only: tuple[str, ...],
    page_only: bool,
) -> None:
    """Run what is missing of the study in FILE and write its page.

    FILE says what is run and claimed. The runs go through DVC's queue; the results are kept in
    docs/<name>-study.csv. Goes on where it was killed.
    """
    from bob.commands.study import study as run_study

    run_study(file, jobs=jobs, again=again, sample=sample, only=only, page_only=page_only)


@cli.command()
@click.option("--only", type=click.Choice(["base", "captioner", "backbone"]), help="One model.")
@click.option("--further", is_flag=True, help="Go on with the base in OUT instead: its UNet.")
@click.option("--measure", is_flag=True, help="Train nothing; measure what lies in models/.")
@click.option("--tiny", is_flag=True, help="Run through everything in a minute, learning nothing.")
@click.option("--out", type=click.Path(path_type=Path), default="models", show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=".miniature", show_default=True)
def miniature(
    only: str | None, further: bool, measure: bool, tiny: bool, out: Path, work: Path
) -> None:
    """Train the miniature's models from scratch; goes on where it was killed.

    Takes hours, and a C++ compiler. `dvc repro` never needs it: the trained models are in the
    repository.
    """
    _prepare_libraries()
    from bob.miniature import build

    if further and (only or measure):
        raise click.UsageError("--further goes alone, or with --tiny")
    if measure:
        for name, what, value in build.measure(out):
            print(f"{name}: {what}: {value}")
    elif further:
        build.train_further(out, work, "tiny" if tiny else "full")
    else:
        build.train(out, work, "tiny" if tiny else "full", only)


@cli.group(invoke_without_command=True)
@click.pass_context
def cache(context: click.Context) -> None:
    """Show the item cache: what was made here and is not made again."""
    if context.invoked_subcommand:
        return
    from bob.cache.items import ItemCache

    with ItemCache() as items:
        for line in items.summary():
            click.echo(shown(line, LINE))


@cache.command()
@click.argument("stages", nargs=-1, metavar="[STAGE]...", type=click.Choice(CACHED))
@click.option(
    "--share",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.05,
    show_default=True,
    help="How much of the items is made again.",
)
def check(stages: tuple[str, ...], share: float) -> None:
    """Make a random share of the cached items again, and forget what comes out otherwise.

    If no stage is named, of all stages with items but finetune, of which a share is a whole
    fine-tuning; and before that, name every file tracked by DVC whose object in DVC's cache was
    written to. Exits with status 1 where an item came out otherwise or an object was written to.
    """
    _prepare_libraries()
    from bob.commands.check import check as check_items
    from bob.commands.check import check_objects

    whole = bool(stages) or check_objects()
    if not check_items(stages or [one for one in CACHED if one != "finetune"], share) or not whole:
        raise SystemExit(1)


_remote = click.option(
    "-r", "--remote", metavar="NAME", help="A remote of DVC's.  [default: DVC's default remote]"
)


@cache.command()
@_remote
def push(remote: str | None) -> None:
    """Bring the items that were made here to a remote of DVC's, for a team.

    Brings only what is not there yet, also by `dvc push`. Goes on where it was killed.
    """
    from bob.commands.team import push as push_items

    push_items(remote)


@cache.command()
@_remote
@click.option("--read-only", is_flag=True, help="Nothing is pushed from here until the next pull.")
def pull(remote: str | None, read_only: bool) -> None:
    """Learn which items a remote of DVC's has; they are fetched when a stage takes them."""
    from bob.commands.team import pull as pull_items

    pull_items(remote, read_only=read_only)


@cache.command()
@click.option(
    "-r",
    "--remote",
    metavar="[NAME]",
    is_flag=False,
    flag_value="",
    required=True,
    help="Of this remote of DVC's, or of its default one.",
)
def gc(remote: str) -> None:
    """Pack the index of a remote, and forget the items whose object is gone there.

    Objects go with `dvc gc --cloud`, the items of this repository with `bob cache prune`.
    """
    from bob.commands.team import gc as collect

    collect(remote or None)


@cache.command()
def prune() -> None:
    """Forget the items whose object is gone, after `dvc gc`."""
    from bob.cache.items import ItemCache

    with ItemCache() as items:
        click.echo(f"{items.prune():,} items forgotten")


@cache.command()
@click.argument("lists", nargs=-1, type=click.Path(exists=True, path_type=Path))
def adopt(lists: tuple[Path, ...]) -> None:
    """Take in the items that LISTS name, where none were pushed: `bob cache pull` needs no lists.

    LISTS are the files results/items/<stage>.jsonl, by default those of the workspace.
    """
    from bob.cache.items import ItemCache
    from bob.formats.layout import ITEMS

    found = lists or sorted(ITEMS.glob("*.jsonl"))
    if not found:
        raise BobError(f"{ITEMS} holds no lists of items; `dvc pull` or `dvc checkout` brings them")
    with ItemCache() as items:
        for path in found:
            adopted, missing = items.adopt(path)
            gone = f", {missing:,} are nowhere in this workspace or its cache" if missing else ""
            click.echo(f"{shown(path)}: {adopted:,} items adopted{gone}")
