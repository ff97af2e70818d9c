"""`bob verify` on the real stages, and on stages that have been made to lie."""

import os
import shlex
import shutil
import sys
import textwrap

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from ruamel.yaml import YAML

from bob.cli import STAGES, cli
from bob.commands import verify
from bob.errors import BobError
from tests.dvc_project import dvc, make_project, run


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    """A project in which every stage has run."""
    folder = make_project(tmp_path_factory.mktemp("reproduced"))
    dvc(folder, "repro")
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A project in which the first two stages have run, with a model for ONNX Runtime."""
    folder = make_project(tmp_path_factory.mktemp("begun"))
    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "identity",
        [shape],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    opset = helper.make_opsetid("", 17)
    onnx.save(
        helper.make_model(graph, opset_imports=[opset], ir_version=8), folder / "models/one.onnx"
    )
    dvc(folder, "repro", "split")
    return folder


@pytest.fixture
def project(begun, tmp_path, monkeypatch):
    """A copy of it to plant a lie in, as the current directory."""
    folder = tmp_path / "project"
    shutil.copytree(
        begun, folder, ignore=lambda at, _: {"cache", "tmp"} if at.endswith(".dvc") else set()
    )
    monkeypatch.chdir(folder)
    return folder


def plant(project, before="pass", after="pass", stage="split"):
    """Have `stage` do something besides, before or after its work."""
    body = textwrap.indent(f"{before}\nhonest(params)\n{after}\n", "    ")
    with (project / f"bob/stages/{stage}.py").open("a") as file:
        file.write(f"\n\nhonest = run\n\n\ndef run(params):\n{body}")


def declare(project, stage="split", **more):
    """Add to the lists that `dvc.yaml` has for `stage`."""
    yaml = YAML()
    pipeline = yaml.load((project / "dvc.yaml").read_text())
    for key, values in more.items():
        pipeline["stages"][stage].setdefault(key, []).extend(values)
    with (project / "dvc.yaml").open("w") as file:
        yaml.dump(pipeline, file)


def verified(*stages):
    """Exit status and lines of `bob verify` in the current directory."""
    result = CliRunner().invoke(cli, ["verify", *stages])
    return result.exit_code, result.output.splitlines()


def findings(stage="split"):
    """What `bob verify` has to say of a stage; the exit status agrees with it."""
    status, lines = verified(stage)
    assert status == 1, lines
    assert lines[-1] == f"stages: 1, findings: {len(lines) - 1}"
    assert all(line.startswith(f"{stage}: ") for line in lines[:-1]), lines
    return [line.removeprefix(f"{stage}: ") for line in lines[:-1]]


# --- honest stages ---------------------------------------------------------------------------


@pytest.mark.slow
def test_every_stage_touches_what_it_declares(reproduced, monkeypatch):
    """And writes the same bytes in the real Python as it has in the warm one of the tests."""
    monkeypatch.chdir(reproduced)
    before = run(reproduced, "git", "status", "--short", "--ignored")
    status, lines = verified()
    assert status == 0, "\n".join(lines)
    *stages, summary = lines
    assert {line.split(": clean (")[0] for line in stages} == set(STAGES)
    assert summary == f"stages: {len(STAGES)}, findings: 0"
    assert run(reproduced, "git", "status", "--short", "--ignored") == before
    assert "up to date" in dvc(reproduced, "status")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_nothing_of_the_project_is_opened_from_the_sandbox(reproduced, monkeypatch, tmp_path):
    """What the kernel sees: also of the libraries that Python sees nothing of."""
    monkeypatch.chdir(reproduced)
    log, python = tmp_path / "log", tmp_path / "python"
    trace = shlex.join(["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(log), sys.executable])
    python.write_text(f'#!/bin/sh\nexec {trace} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    (stage,) = verify.read_pipeline(["benchmark"])

    sandbox = verify.Sandbox(stage, reproduced, tmp_path)
    seen_by_python = sandbox.run().opened

    calls = log.read_text()
    assert str(reproduced) not in calls
    model = "results/export/classifier.onnx"
    assert f'"{model}"' in calls or str(sandbox.folder / model) in calls
    assert str(sandbox.folder / model) not in seen_by_python


def test_stages_are_verified_in_the_order_in_which_they_run(project):
    status, lines = verified("split", "draw")
    assert status == 0
    assert lines == [
        "draw: clean (5 dependencies)",
        "split: clean (22 dependencies)",
        "stages: 2, findings: 0",
    ]


# --- lies ------------------------------------------------------------------------------------

READS = {
    "open": ("open('README.md').read()", "README.md"),
    "PIL": (
        "from PIL import Image; Image.open('docs/contact-sheet.png').load()",
        "docs/contact-sheet.png",
    ),
    "safetensors": (
        "from safetensors.numpy import load_file; "
        "load_file('models/miniature-backbone/model.safetensors')",
        "models/miniature-backbone/model.safetensors",
    ),
    "tokenizers": (
        "from tokenizers import Tokenizer; "
        "Tokenizer.from_file('models/miniature-base/tokenizer/tokenizer.json')",
        "models/miniature-base/tokenizer/tokenizer.json",
    ),
    "transformers": (
        "from transformers import AutoTokenizer; "
        "AutoTokenizer.from_pretrained('models/miniature-captioner')",
        "models/miniature-captioner",
    ),
    "onnxruntime": (
        "import onnxruntime; onnxruntime.InferenceSession('models/one.onnx')",
        "models/one.onnx",
    ),
}


@pytest.mark.parametrize(
    "reader",
    [
        pytest.param(reader, marks=[pytest.mark.slow] if reader == "transformers" else [])
        for reader in READS
    ],
)
def test_a_read_is_to_be_declared(project, reader):
    code, path = READS[reader]
    plant(project, code)
    run(project, sys.executable, "-m", "bob", "split")  # nobody notices here
    assert findings() == [f"needs {path}, which is not declared; add it to stages.split.deps"]
    declare(project, deps=[path])
    assert verified("split") == (
        0,
        ["split: clean (23 dependencies)", "stages: 1, findings: 0"],
    )


def test_a_file_that_the_error_does_not_name_is_missed_all_the_same(project):
    path = "'/'.join(['models', 'miniature-captioner', 'tokenizer.json'])"
    plant(project, f"from tokenizers import Tokenizer; Tokenizer.from_file({path})")
    (finding,) = findings()
    assert finding.startswith("fails with only what it declares: ")
    assert "No such file or directory" in finding


def test_a_read_that_the_stage_can_do_without_is_to_be_declared(project):
    plant(project, "try: open('README.md')\nexcept OSError: pass")
    assert findings() == ["needs README.md, which is not declared; add it to stages.split.deps"]


def test_a_look_that_changes_the_output_is_noticed(project):
    """Python does not tell when it is asked whether a file exists, but the bytes do."""
    plant(
        project,
        "from pathlib import Path",
        "(SPLIT / 'seen.txt').write_text(str(Path('models').exists()))",
    )
    (stale,) = findings()
    assert stale == (
        "the workspace's results/split/seen.txt is of other dependencies; "
        "run `dvc repro` and verify again"
    )
    dvc(project, "repro", "-s", "split")
    (finding,) = findings()
    assert finding.startswith("makes another results/split/seen.txt than the workspace has")


def test_an_absolute_path_into_the_project_is_noticed(project):
    plant(project, f"open({str(project / 'README.md')!r}).read()")
    assert findings() == [
        "opens README.md by an absolute path; open it relative to the project's root"
    ]


@pytest.mark.parametrize(
    "statement", ["import bob.formats.prompts", "from bob.formats import prompts"]
)
def test_a_module_is_to_be_declared(project, statement):
    """Also where bob is installed from the project's folder, and would be found there."""
    plant(project, statement)
    run(project, sys.executable, "-m", "bob", "split")
    assert findings() == [
        "needs bob/formats/prompts.py, which is not declared; add it to stages.split.deps"
    ]


def test_bytecode_that_python_keeps_beside_the_modules_is_not_asked_for(project):
    run(project, sys.executable, "-m", "compileall", "-q", "bob")
    assert list((project / "bob/stages/__pycache__").glob("split.*.pyc"))
    assert verified("split")[0] == 0


def test_a_parameter_is_to_be_declared(project):
    plant(project, "params.generate.steps")
    (finding,) = findings()
    assert "reads the parameter generate, which" in finding
    assert finding.endswith("add it under stages.split.params")


def test_a_parameter_read_past_the_stages_own_is_not_there(project):
    plant(project, "from bob.formats.params import load; load()['generate']")
    run(project, sys.executable, "-m", "bob", "split")
    assert findings() == ["fails with only what it declares: KeyError: 'generate'"]


def test_a_dependency_that_is_not_needed_is_named(project):
    declare(project, deps=["bob/formats/prompts.py", "models/miniature-backbone"])
    assert findings() == [
        f"does not need {dep}, without it come the same bytes; remove it from stages.split.deps"
        for dep in ("bob/formats/prompts.py", "models/miniature-backbone")
    ]


def test_an_optional_dependency_need_not_be_needed(project):
    yaml = YAML()
    pipeline = yaml.load((project / "dvc.yaml").read_text())
    pipeline["stages"]["split"]["meta"] = {"optional_deps": ["models/miniature-backbone"]}
    with (project / "dvc.yaml").open("w") as file:
        yaml.dump(pipeline, file)
    declare(project, deps=["models/miniature-backbone"])
    status, _ = verified("split")
    assert status == 0


def test_a_parameter_that_is_not_read_is_named(project):
    declare(project, params=["audit", "finetune.rank"])
    assert findings() == [
        f"never reads the parameter {key}; remove it from stages.split.params"
        for key in ("audit", "finetune.rank")
    ]


def test_a_write_is_to_be_declared(project):
    plant(project, "from pathlib import Path", "Path('results/stray.txt').write_text('stray')")
    assert findings() == [
        "writes results/stray.txt, which is not declared; add it to stages.split.outs"
    ]
    assert not (project / "results/stray.txt").exists()


def test_a_write_to_a_dependency_is_named_and_does_not_reach_the_project(project):
    dataset = project / "data/miniature/dataset.yaml"
    before = dataset.read_bytes()
    plant(project, "open('data/miniature/dataset.yaml', 'a').write('# mine')")
    (finding,) = findings()
    assert finding == (
        "changes data/miniature/dataset.yaml, which it depends on; write to outputs only"
    )
    assert dataset.read_bytes() == before


def test_bytes_that_differ_from_run_to_run_are_named_unless_declared(project):
    write = "(SPLIT / f'{number}.txt').write_text(str(hash('bob')))"
    plant(project, after=f"for number in range(3): {write}")
    assert findings() == [
        "writes other bytes to results/split/0.txt (and 2 more) in every run; make it "
        "deterministic, or declare the output with `meta: {deterministic: false}`"
    ]
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(
        text.replace("- results/split\n", "- results/split: {meta: {deterministic: false}}\n", 1)
    )
    status, _ = verified("split")
    assert status == 0


# --- what is wrong before a stage can be run ----------------------------------------------------


def test_mistakes_are_told_in_one_line(project):
    assert verified("spilt") == (
        1,
        [f"Error: dvc.yaml has no stage spilt; it has {', '.join(names())}"],
    )
    assert verified("evaluate") == (
        1,
        ["Error: results/classify is missing; `dvc repro` makes what evaluate depends on"],
    )
    declare(project, params=["data.nmae"])
    assert verified("split") == (
        1,
        ["Error: params.yaml has no data.nmae; remove it from stages.split.params"],
    )


def change(project, stage="split", **entry):
    """Set what `dvc.yaml` has for `stage`."""
    yaml = YAML()
    pipeline = yaml.load((project / "dvc.yaml").read_text())
    pipeline["stages"][stage].update(entry)
    with (project / "dvc.yaml").open("w") as file:
        yaml.dump(pipeline, file)


def error(stage="split"):
    status, lines = verified(stage)
    assert status == 1 and len(lines) == 1, lines
    return lines[0].removeprefix("Error: ")


@pytest.mark.parametrize("kind", ["outs", "deps"])
def test_nothing_outside_the_project_is_copied_or_written(project, kind):
    """An absolute output was removed from its place once, as DVC does before it runs a stage."""
    mine = project.parent / "mine.txt"
    mine.write_text("of the user")
    declare(project, **{kind: [{str(mine): {"cache": False}} if kind == "outs" else str(mine)]})
    assert error().startswith(f"dvc.yaml: stages.split names {mine}, which is not a path in the")
    assert mine.read_text() == "of the user"
    assert sorted(one.name for one in project.parent.iterdir()) == ["mine.txt", "project"]


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("data/a", True),
        ("a/../b", True),
        ("..a", True),
        ("/etc/passwd", False),
        ("..", False),
        ("../a", False),
        ("data/../../a", False),
        (".", False),
        ("s3://bucket/a", False),
    ],
)
def test_what_is_in_the_project(path, inside):
    assert verify._is_inside(path) == inside


@pytest.mark.parametrize(
    "command",
    [
        "python -m bob split && touch x",
        "python -m bob split; true",
        "python -m bob split > log",
        "python -m bob split $(touch x)",
        "python -m bob split\ntrue",
        "python -m bob 'split",
        "['python -m bob split', 'true']",
        "true",
    ],
)
def test_a_command_of_several_parts_is_told(command):
    with pytest.raises(BobError, match=r"^stages\.x\.cmd is not one `python -m bob"):
        verify._arguments(command, "stages.x")
    assert verify._arguments("python -m bob split", "stages.x") == ("split",)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"meta": {"optional_deps": 5}}, "stages.split.meta: optional_deps is 5; allowed: a list"),
        ({"meta": 5}, "stages.split.meta: the content is 5; allowed: a mapping"),
        (
            {"outs": [{"results/split": {"meta": {"deterministic": "no"}}}]},
            'stages.split.outs.results/split.meta: deterministic is "no"; allowed: true or false',
        ),
        ({"wdir": "data"}, "stages.split has a wdir"),
        ({"params": [{"other.yaml": ["a"]}]}, "stages.split.params names other.yaml; bob reads"),
        ({"deps": 5}, "validation failed; `dvc status` shows where"),
    ],
)
def test_an_entry_that_cannot_be_verified_is_told(project, entry, told):
    change(project, **entry)
    assert told in error()


def test_a_schema_that_is_broken_is_told(project):
    (project / "bob/formats/params.schema.json").write_text("{")
    assert "params.schema.json: not JSON" in error()


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_is_no_file_among_the_dependencies_is_told(project, kind):
    odd = project / "data/miniature/odd"
    os.mkfifo(odd) if kind == "pipe" else odd.symlink_to("nowhere")
    assert error().endswith("odd, in data/miniature, is no file and no folder; remove it")


def test_bytecode_in_a_folder_that_is_declared_is_not_read(project):
    run(project, sys.executable, "-m", "compileall", "-q", "bob")
    declare(project, deps=["bob/stages"])
    assert verified("split")[0] == 0


def names():
    return [stage.name for stage in verify.read_pipeline()]
