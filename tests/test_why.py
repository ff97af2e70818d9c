"""`bob why`: the causes it names are what was changed."""

import hashlib
import subprocess

import pytest
from click.testing import CliRunner
from dvc.repo import Repo

from bob.cache.index import LastRun, Row
from bob.cache.items import ItemCache
from bob.cache.recipe import Maker, versions
from bob.cli import cli
from bob.commands.why import listed, module_changes, present_maker
from tests.dvc_project import environment

PIPELINE = """\
stages:
  split:
    cmd: cp -r data/birds results/split
    deps: [bob/split.py, data/birds]
    params: [data.shots]
    outs: [results/split]
  generate:
    cmd: mkdir results/generate && cp results/split/Anna/1.jpg results/generate
    deps: [results/split]
    params: [generate]
    outs: [results/generate]
  audit:
    cmd: cp -r results/generate results/audit
    deps: [results/generate]
    outs: [results/audit]
"""
MODULE = '''\
"""A module."""

SIDES = 3


class Splitter:
    """A class."""

    size = 1

    def draw(self):
        """A method."""
        return self.size

    def rest(self):
        return 0


def run():
    return Splitter().draw()
'''
PARAMS = "data:\n  shots: 5\ngenerate:\n  steps: 20\n  sampler: ddim\n"


def git(folder, *arguments):
    subprocess.run(["git", *arguments], cwd=folder, env=environment(folder), check=True)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small pipeline that has run and is committed, as the current folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "dvc.yaml": PIPELINE,
        "params.yaml": PARAMS,
        "bob/split.py": MODULE,
        "data/birds/Anna/1.jpg": "1",
        "data/birds/Anna/3.jpg": "3",
        "data/birds/Rufous/1.jpg": "4",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "results").mkdir()
    git(tmp_path, "init", "--quiet")
    with Repo.init() as repo:
        repo.add("data/birds")
        repo.reproduce()
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "run")
    return tmp_path


def why(*stages):
    result = CliRunner().invoke(cli, ["why", *stages])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_up_to_date_and_unknown(project):
    assert why() == ["split: up to date", "generate: up to date", "audit: up to date"]
    assert why("audit") == ["audit: up to date"]
    result = CliRunner().invoke(cli, ["why", "audt"])
    assert result.exit_code == 1
    assert result.output == "Error: audt: no such stage; there are split, generate, audit\n"


def test_parameters_and_what_follows_from_them(project):
    replace(project / "params.yaml", "steps: 20\n  sampler: ddim", "steps: 25\n  eta: [1, 2]")
    assert why() == [
        "split: up to date",
        "generate: parameter generate.steps 20 -> 25",
        "generate: parameter generate.sampler ddim -> none",
        "generate: parameter generate.eta none -> [1, 2]",
        "audit: may run: results/generate is made again by generate",
    ]
    # It has come out as it was, and so nothing followed.
    with Repo() as repo:
        repo.reproduce()
    assert why() == ["split: up to date", "generate: up to date", "audit: up to date"]

    (project / "params.yaml").write_text("generate:\n  steps: 25\n  eta: [1, 2]\n")
    assert why("split") == ["split: parameter data.shots is missing"]


def test_the_files_of_a_folder_that_git_tracks_are_named(project):
    """Against the version that the last run had, whichever commit that is."""
    folder = project / "data/review"
    folder.mkdir()
    (project / ".dvcignore").write_text("/data/review/.*\n")
    (folder / ".gitattributes").write_text("*.jsonl merge=union\n")
    replace(project / "dvc.yaml", "data/birds]", "data/birds, data/review]")

    def run():
        with Repo() as repo:
            repo.reproduce()

    run()
    assert why("split") == ["split: up to date"]
    (folder / "mine.jsonl").write_text("1\n")  # nothing was there, which needs no git
    assert why("split") == ["split: data/review: mine.jsonl added"]
    run()
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "mine")
    (folder / "mine.jsonl").write_text("2\n")
    (folder / "hers.jsonl").write_text("1\n")
    assert why("split") == ["split: data/review: hers.jsonl added, mine.jsonl changed"]
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "not run")
    (folder / "mine.jsonl").unlink()
    assert why("split") == ["split: data/review: hers.jsonl added, mine.jsonl removed"]
    run()
    (folder / "hers.jsonl").write_text("3\n")
    assert why("split") == ["split: data/review changed"]  # what ran was not committed


def test_upstream(project):
    replace(project / "params.yaml", "shots: 5", "shots: 6")
    replace(project / "params.yaml", "steps: 20", "steps: 25")
    assert why() == [
        "split: parameter data.shots 5 -> 6",
        "generate: results/split, made by split (see there)",
        "generate: parameter generate.steps 20 -> 25",
        "audit: may run: results/generate is made again by generate",
    ]
    replace(project / "params.yaml", "steps: 25", "steps: 20")
    assert why("generate", "audit") == [
        "generate: may run: results/split is made again by split",
        "audit: may run: results/generate may be made again by generate",
    ]
    # Upstream alone has run since, and came out otherwise.
    (project / "data/birds/Anna/1.jpg").write_text("5")
    with Repo() as repo:
        repo.reproduce("split")
    assert why("split", "generate") == [
        "split: up to date",
        "generate: results/split, made anew by split since",
    ]
    assert why("audit") == ["audit: may run: results/generate is made again by generate"]


def test_the_files_of_a_folder(project):
    birds = project / "data/birds"
    (birds / "Anna/3.jpg").write_text("other")
    (birds / "Anna/9.jpg").write_text("9")
    (birds / "Rufous/1.jpg").unlink()
    assert why("split") == [
        "split: data/birds: Anna/3.jpg changed, Anna/9.jpg added, Rufous/1.jpg removed"
    ]
    for number in range(2):
        (birds / f"Anna/{number}.png").write_text("new")
    (line,) = why("split")
    assert line.endswith(" and 2 more")


def test_code_by_function(project):
    module = project / "bob/split.py"
    replace(module, "return self.size", "# Why.\n        return  self.size")
    replace(module, '"""A class."""', '"""The class."""')
    assert why("split") == ["split: bob/split.py: comments or layout only"]

    replace(module, "return  self.size", "return self.size + 1")
    # Another commit, of the module alone: what counts is the version that ran.
    git(project, "commit", "--quiet", "--all", "--message", "code")
    assert why("split") == ["split: bob/split.py: Splitter.draw changed"]

    module.write_text("def broken(:\n")
    assert why("split") == ["split: bob/split.py changed (one of its versions is not Python)"]

    # A version that ran and was never committed.
    module.write_text(MODULE)
    replace(project / "dvc.lock", hashlib.md5(MODULE.encode()).hexdigest(), "f" * 32)
    assert why("split") == ["split: bob/split.py changed (its earlier version is not in git)"]


def test_a_version_from_before_the_lock(project):
    replace(project / "bob/split.py", "SIDES = 3", "SIDES = 4")
    replace(project / "dvc.lock", "schema: '2.0'", "schema: '2.0' # both in one commit")
    git(project, "commit", "--quiet", "--all", "--message", "both")
    assert why("split") == ["split: bob/split.py: module level changed"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    def rest(self):\n        return 0\n", "", "Splitter.rest removed"),
        ("def run", "def more():\n    pass\n\n\ndef run", "more added"),
        ("size = 1", "size = 2", "Splitter changed"),
        ("class Splitter", "class Drawer", "Drawer added, Splitter removed"),
        ("def run", "async def run", "run changed"),
        ("def rest", "@property\n    def rest", "Splitter.rest changed"),
        ("SIDES = 3", "import os", "module level changed"),
    ],
)
def test_what_changed_in_a_module(old, new, said):
    words = module_changes(MODULE, MODULE.replace(old, new)).split(", ")
    # A class that is renamed takes its user with it only where that was changed, too.
    assert ", ".join(words) == said


def test_definitions_in_another_order():
    one, other = "def a():\n    '''Docs.'''\n", "def b():\n    return 1\n"
    assert module_changes(one + other, other + one) == "its definitions are in another order"
    assert listed([(str(n), "added") for n in range(5)]) == "0 added, 1 added, 2 added and 2 more"


def test_outputs(project):
    (project / "results/audit/1.jpg").unlink()
    (project / "results/audit").rmdir()
    (project / "results/generate/1.jpg").unlink()
    (project / "results/generate/1.jpg").write_text("mine")
    assert why() == [
        "split: up to date",
        "generate: results/generate was changed by hand",
        "audit: results/audit is missing",
    ]


def test_declarations(project):
    pipeline = project / "dvc.yaml"
    replace(pipeline, "[bob/split.py, data/birds]", "[data/birds]")
    replace(pipeline, "[data.shots]", "[data]")
    replace(pipeline, "cp -r results/generate", "cp  -r results/generate")
    replace(pipeline, "    params: [generate]\n", "")
    pipeline.write_text(
        pipeline.read_text().replace("  audit:", "  last:\n    cmd: echo\n\n  audit:")
    )
    assert why() == [
        "split: now depends on parameter data",
        "split: no longer depends on bob/split.py, which makes nothing run",
        "split: no longer depends on parameter data.shots, which makes nothing run",
        "generate: may run: results/split is made again by split",
        "generate: no longer depends on parameter generate, which makes nothing run",
        "last: has never run here",
        "audit: cmd changed",
        "audit: results/generate, which may be made by generate (see there)",
    ]


def test_what_dvc_yaml_no_longer_declares_makes_nothing_run(project):
    replace(project / "dvc.yaml", "[bob/split.py, data/birds]", "[data/birds]")
    assert why("split") == [
        "split: up to date",
        "split: no longer depends on bob/split.py, which makes nothing run",
    ]
    with Repo() as repo:
        assert repo.reproduce() == []


def test_a_module_that_moved(project):
    (project / "bob/stages").mkdir()
    (project / "bob/split.py").rename(project / "bob/stages/split.py")
    replace(project / "bob/stages/split.py", "return 0", "return 1")
    replace(project / "dvc.yaml", "bob/split.py", "bob/stages/split.py")
    assert why("split") == [
        "split: bob/stages/split.py, which was bob/split.py: Splitter.rest changed"
    ]


def test_a_missing_dependency(project):
    replace(project / "dvc.yaml", "deps: [results/generate]", "deps: [results/generate, gone.txt]")
    assert why("audit") == ["audit: gone.txt is missing"]


def test_items(project):
    present = versions(["pillow"])
    maker = Maker({"errors": "another", "no.longer": "x"}, {"pillow": "1.0", "numpy-gone": "2"})
    with ItemCache() as cache:
        cache.index.record_run(LastRun("generate", 768, 32, "steps 20 -> 25"))
        cache.index.record_maker(maker)
        cache.index.add([Row("recipe", maker.id, "0" * 32, 1, "generate")])
    changed = f"pillow 1.0 -> {present['pillow']}, numpy-gone 2 -> none, bob/errors.py"
    assert why("generate") == [
        "generate: up to date",
        "generate: (last run: 768 items reused, 32 made, because: steps 20 -> 25)",
        f"generate: (its items were made by other code: {changed}, bob/no/longer.py)",
    ]
    assert why("audit") == ["audit: up to date"]
    assert Maker({}, present).changes(present_maker(Maker({}, present))) == []
