"""The commands, parameters and links in the documentation are those of this project.

Every command is parsed by the program that it calls, and its parameters are held to the schema.
What the commands do is for other tests: most of those in the pages need a network, a GPU or hours.
"""

import copy
import fnmatch
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from dvc.cli import DvcParserError, parse_args
from ray.scripts.scripts import cli as ray_cli
from ruamel.yaml import YAML

from bob.cli import STAGES, cli
from bob.commands.study.plan import read_study
from bob.errors import BobError
from bob.formats import params
from bob.formats.layout import PREDICT
from bob.formats.presets import PRESETS, read_presets
from bob.models import predictor
from bob.models.endpoint import Endpoint
from tests.conftest import ROOT

PAGES = sorted(
    page
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md"))
    if not page.name.endswith("-study.md")  # written by `bob study`
)
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
OF_THE_SYSTEM = {"echo", "git", "mkdir"}
OF_THE_TARGETS = {"repro", "run", "pull", "push"}  # DVC's, whose arguments are stages


@dataclass(frozen=True)
class Command:
    """A command as it stands in a page."""

    page: str
    words: tuple[str, ...]
    whole: bool
    """In a block; in a sentence it may stand without what it needs: `dvc add`."""

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    """Every command in a page's blocks (after `$ `), and those of bob, DVC and make in its text."""
    text = page.read_text()
    for block in BLOCK.finditer(text):
        lines = re.sub(r"\\\n\s*", "", block[3]).splitlines()
        for line in lines:
            if line.strip().startswith("$ "):
                yield from split(page, line.strip()[2:], whole=True)
    for code in re.findall(r"`([^`]+)`", BLOCK.sub("", text)):
        code = " ".join(code.split())
        if re.match(r"(bob|dvc|make|python -m) |-S ", code):
            yield from split(page, code, whole=False)


def split(page: Path, line: str, *, whole: bool) -> Iterator[Command]:
    name = str(page.relative_to(ROOT))
    words = shlex.split(line, comments=True)
    for is_and, group in itertools.groupby(words, lambda word: word == "&&"):
        rest = itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S*", word), group)
        # `...` and [STAGE...] stand for what a reader puts there.
        found = tuple(word for word in rest if word != "..." and not word.startswith("["))
        if found and not is_and:
            yield Command(name, ("dvc", "exp", "run", *found) if found[0] == "-S" else found, whole)


ALL = [command for page in PAGES for command in commands(page)]


def told(command: Command, home: Path) -> str | None:
    """What is wrong with a command; None if nothing is."""
    head, *rest = command.words
    try:
        if head == "bob":
            return told_by_click(cli, "bob", rest, command.whole, home)
        if head == "pip":
            pinned = rest[:3] == ["install", "-c", "constraints.txt"]
            return None if pinned else "pip is to install what constraints.txt pins"
        if head == "ray":
            return told_by_click(ray_cli, "ray", rest, command.whole, home)
        if head == "dvc":
            return told_by_dvc(rest, command.whole)
        if head == "make":
            return None if f"\n{rest[0]}: " in (ROOT / "Makefile").read_text() else "no such target"
        if head == "python":
            return told_of_module(rest)
    except (BobError, click.UsageError) as error:
        return str(error)
    return None if head in OF_THE_SYSTEM else f"the tests do not know {head}"


def told_by_click(
    command: click.Command, name: str, words: list[str], whole: bool, home: Path
) -> str | None:
    while isinstance(command, click.Group) and words:
        if words[0] not in command.commands:
            return f"{name} has no command {words[0]}"
        name, words = words[0], words[1:]
        command = command.commands[name]
    # The reader's own file, which --from wants to find.
    given = [word.replace("~", str(home)) for word in words]
    for word in given:
        if word.startswith(str(home)):
            Path(word).touch()
    try:
        values = command.make_context(name, given).params if given or whole else {}
    except click.MissingParameter:
        if whole:
            raise
        return None
    if strange := set(values.get("stages") or ()) - set(STAGES):
        return f"no stages: {strange}"
    if whole and (strange := set(values.get("names") or ()) - set(read_presets(ROOT / PRESETS))):
        return f"no presets: {strange}"
    if name == "study" and values:
        named = read_study(values["file"]).settings
        unused = [only for only in values["only"] if not fnmatch.filter(named, only)]
        return f"no setting fits {unused}" if unused else None
    return None


def told_by_dvc(words: list[str], whole: bool) -> str | None:
    try:
        parsed = parse_args(words)
    except DvcParserError:
        try:
            # In a sentence: `dvc add`.
            parsed = None if whole else parse_args([*words, "x"])
        except DvcParserError:
            parsed = None
        return None if parsed else "DVC does not understand it"
    targets = getattr(parsed, "targets", None) or []
    if words[0] in OF_THE_TARGETS and (strange := set(targets) - set(STAGES)):
        return f"no stages: {strange}"
    for change in getattr(parsed, "set_param", None) or []:
        key, _, values = change.partition("=")
        for value in values.split(","):  # a sweep, with --queue
            check_parameter(key, YAML(typ="safe").load(value))
    return None


def check_parameter(key: str, value: Any) -> None:
    """Raises BobError where `params.yaml` has no such key, or may not have this value."""
    values = copy.deepcopy(params.read_yaml(ROOT / "params.yaml"))
    section, name = key.split(".")
    values.setdefault(section, {})[name] = value
    params.check(Path(key), values, params.schema())


def told_of_module(words: list[str]) -> str | None:
    """`python -m bench.NAME --option`; to ask the script itself would be to import torch.

    Or the script that is exported.
    """
    if words[0] == str(PREDICT):
        _, unknown = predictor.command_line().parse_known_args(words[1:])
        return f"predict.py has no {unknown}" if unknown else None
    if words[0] != "-m":
        return "not a module's call"
    found = importlib.util.find_spec(words[1])
    if found is None or found.origin is None:
        return "no such module"
    source = Path(found.origin).read_text()
    missing = [word for word in words[2:] if word.startswith("-") and f'"{word}"' not in source]
    return f"{words[1]} has no {missing}" if missing else None


def test_every_command_is_understood_by_what_it_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert {command.page for command in ALL} >= {"README.md", "docs/full-size.md", "docs/study.md"}
    wrong = [f"{command}\n  {why}" for command in ALL if (why := told(command, tmp_path))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("bob plant", "no command plant"),
        ("bob plan --cpu", "--cpu"),
        ("bob dataset birds", "birds"),
        ("bob fetch org/x models/x more", "more"),
        ("bob why generat", "generat"),
        ("bob use full sd12", "sd12"),
        ("bob study experiments/none.yaml", "none.yaml"),
        ("bob study experiments/table-1.yaml --only nothing", "no setting"),
        ("dvc exp run --cue -S data.shots=5", "understand"),
        ("dvc repro generat", "generat"),
        ("dvc exp run -S data.shot=5", "data.shots"),
        ("dvc exp run -S datas.shots=5", "datas"),
        ("dvc exp run --queue -S generate.sampler=ddim,dmi", "dmi"),
        ("python -m bench.speedy", "module"),
        ("python -m bench.reuse --small", "--small"),
        ("python results/export/predict.py --tip 1 photo.jpg", "--tip"),
        ("make all", "target"),
        ("pip install bob", "pip"),
    ],
)
def test_a_wrong_command_is_found(line, why, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = split(ROOT / "README.md", line, whole=True)
    assert why in str(told(command, tmp_path))


def named_parameters(text: str) -> set[str]:
    """`generate.steps`, `finetune.compile=true`, `caption.bank: ...` in code; not `classify.*`."""
    sections = "|".join(params.schema()["properties"])
    return set(re.findall(rf"`((?:{sections})\.[a-z_]+(?:=\w+)?)[`:]", BLOCK.sub("", text)))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_parameters_named_in_a_sentence_exist(page):
    values = params.read_yaml(ROOT / "params.yaml")
    for name in named_parameters(page.read_text()):
        key, _, value = name.partition("=")
        section, _, last = key.partition(".")
        assert last in values[section], f"{page.name}: {key}"
        if value:
            check_parameter(key, YAML(typ="safe").load(value))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?[^)]*\)", page.read_text()):
        if target.startswith("https://"):
            continue
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not heading or heading in headings(linked), f"{target}#{heading}"


def headings(page):
    """What a link may name of a page, as GitHub makes it of its headings."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_a_sentence_are_there(page):
    tracked = r"`((?:bob|bench|experiments|tests)/[\w/.-]*)`"
    for name in re.findall(tracked, BLOCK.sub("", page.read_text())):
        in_dvcs_cache = name in ("bob/items.sqlite", "bob/checkpoints/")
        assert in_dvcs_cache or (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_block_that_names_an_endpoint_makes_one(workspace):
    """The one block of commands that needs nothing but a shell."""
    block = next(
        block[3]
        for block in BLOCK.finditer((ROOT / "docs/full-size.md").read_text())
        if "endpoint.json" in block[3]
    )
    script = re.sub(r"^\$ ", "", block, flags=re.MULTILINE).partition("dvc add")[0]
    (workspace / "models").mkdir()
    subprocess.run(["sh", "-ec", script], check=True)
    written = json.loads(Path("models/served/endpoint.json").read_text())
    endpoint = Endpoint(Path("models/served"), batch_size=1)
    assert endpoint.settings["model"] == written["model"]
