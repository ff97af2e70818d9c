"""What a user hears of a mistake in params.yaml."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from bob.errors import BobError
from bob.formats import params
from tests.conftest import ROOT


@pytest.fixture
def project(workspace):
    for name in ("params.yaml", "dvc.yaml"):
        (workspace / name).write_text((ROOT / name).read_text())
    return workspace


def change(project, section, key, value):
    yaml = YAML()
    path = project / "params.yaml"
    values = yaml.load(path.read_text())
    if value is None:
        del values[section][key]
    else:
        values[section][key] = value
    yaml.dump(values, path)


def told():
    with pytest.raises(BobError) as caught:
        params.load()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "shots", "five", 'is "five"; allowed: a whole number from 1 to 1000000 or all'),
        ("data", "shots", 0, "data.shots is 0; allowed: a whole number from 1 to 1000000 or all"),
        ("data", "shots", 2.0, "data.shots is 2.0; allowed: a whole number from 1 to 1000000 or"),
        ("data", "seed", 7.0, "data.seed is 7.0; allowed: a whole number from 0 to 2147483647"),
        ("data", "seed", True, "data.seed is true; allowed: a whole number from 0"),
        ("data", "imbalance", math.inf, "data.imbalance is no finite number; allowed: a number"),
        ("data", "imbalance", math.nan, "data.imbalance is no finite number; allowed: a number"),
        ("generate", "steps", -math.inf, "generate.steps is no finite number; allowed: a whole"),
        ("generate", "images_per_class", 10**12, "images_per_class is 1000000000000; allowed: a"),
        ("generate", "images_per_class", 10**999, "images_per_class is 100000"),
        ("data", "name", "x" * 9999, 'data.name is "xxx'),
        ("data", "name", ["x"] * 9999, 'data.name is ["x", "x"'),
        ("data", "x" * 9999, 1, "xxx is not a known key; known here: name"),
        ("data", "a\nb\x1b", 1, "data.a\\nb\\x1b is not a known key; known here: name"),
        ("data", "imbalance", 0.5, "data.imbalance is 0.5; allowed: a number from 1"),
        ("data", "name", "../mine", 'data.name is "../mine"; allowed: the name of a folder'),
        ("data", "test_fraction", 1.5, "allowed: a number above 0 below 1"),
        ("finetune", "base_model", "/tmp/sd", "allowed: a folder models/<name>"),
        ("finetune", "context", "bank", 'finetune.context is "bank"; allowed: caption, none'),
        ("generate", "guidence_scale", 3, "did you mean generate.guidance_scale?"),
        ("generate", "xyz", 3, "generate.xyz is not a known key; known here: context, "),
        ("generate", "steps", None, "generate.steps is missing; allowed: a whole number from 1"),
        ("generate", "context", "mine.jsonl", "bank, class, none or a file data/contexts/<name>"),
        ("generate", "sampler", "dpm", 'generate.sampler is "dpm"; allowed: dpmsolver++, ddim'),
        ("classify", "real_weight", 1.1, "allowed: a number from 0 to 1"),
        ("classify", "layer_decay", 0, "allowed: a number above 0 to 1"),
        ("classify", "seeds", [], "classify.seeds is []; allowed: a list of at least 1"),
        (
            "export",
            "precisions",
            ["fp32", "int4"],
            'export.precisions.1 is "int4"; allowed: fp32, fp16',
        ),
        ("export", "precisions", ["int8"], "allowed: a list of fp32 and any of fp16, int8"),
        ("export", "precisions", [], "allowed: a list of fp32 and any of fp16, int8"),
        ("benchmark", "batch_sizes", [0], "benchmark.batch_sizes.0 is 0; allowed: a whole number"),
    ],
)
def test_a_mistake_is_told_with_its_path_and_what_is_allowed(project, section, key, value, message):
    change(project, section, key, value)
    assert message in told()
    assert told().startswith("params.yaml: ")


def test_a_misspelt_section_is_told(project):
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("\ngenerate:", "\ngenerat:"))
    assert "generat is not a known key; did you mean generate?" in told()


def test_no_yaml_and_no_file_are_told(project):
    (project / "params.yaml").write_text("data: [1,\n")
    assert "params.yaml: not YAML" in told()
    (project / "params.yaml").unlink()
    assert "run from the folder that holds dvc.yaml" in told()


def bomb(one: str) -> str:
    """YAML of 9 ** 9 values: each line nine times the one before, by aliases."""
    lines = [
        f"a0: &a0 {one}",
        *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)),
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb("x"), "a7 is more than 1,000,000 values, as its aliases (*) repeat them"),
        (
            bomb("{x: 1}").replace("[*", "{<<: [*").replace("]", "]}"),
            "a6.<< is more than 1,000,000",
        ),
        ("data: &data [*data]", "data is more than 1,000,000 values"),
        ("data: " + "[" * 9999, "not YAML that bob reads (it is nested too deeply)"),
        ("data:\n  seed: " + "9" * 9999, "data.seed is not what YAML allows (Exceeds the limit"),
        ("data: [2001-13-01]", "data.0 is not what YAML allows (month must be in 1..12)"),
        ("data: !!int x", "not what YAML allows (invalid literal"),
        ("#" * 1_000_001, "longer than 1,000,000 characters"),
        ("data: {? {a: b} : c}", "not YAML (while constructing a mapping"),
        ("data:\n  name: 1e999", "data.name is no finite number; allowed: the name of a folder"),
        ("3", "params.yaml: the content is 3; allowed: a section of parameters"),
    ],
)
def test_yaml_that_nothing_can_be_done_with_is_one_line(project, content, message):
    (project / "params.yaml").write_text(content)
    assert message in told()


def test_aliases_that_repeat_little_are_read(project):
    (project / "params.yaml").write_text("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\n")
    read = params.read_yaml(project / "params.yaml")
    assert read == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.dates()),
    *(st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers())),
    st.sampled_from([".inf", "1e999", "!!int x", "*a", "&a [*a]", "2001-13-01", "9" * 5000]),
)


@settings(max_examples=60, derandomize=True, deadline=5000)
@given(st.dictionaries(st.integers(0, 60), VALUES, max_size=3), st.text(max_size=9))
def test_whatever_is_in_params_is_valid_or_one_line(changed, rest):
    lines = [line.split(" #")[0] for line in (ROOT / "params.yaml").read_text().splitlines()]
    for number, value in changed.items():
        lines[number] = f"{lines[number].split(':')[0]}: {value}"
    with tempfile.NamedTemporaryFile(suffix="\n.yaml") as file:
        path = Path(file.name)
        path.write_bytes("\n".join([*lines, rest]).encode("utf-8", "surrogatepass"))
        try:
            values = params.read_yaml(path)
            params.check(path, values, params.schema())
        except BobError as error:
            assert "\\n.yaml" in str(error) and len(str(error).splitlines()) == 1
        else:
            assert type(values["data"]["seed"]) is int
            json.dumps(values, allow_nan=False)


def test_a_number_in_scientific_notation_is_a_number(project):
    change(project, "finetune", "learning_rate", 1)
    text = (
        (project / "params.yaml").read_text().replace("learning_rate: 1\n", "learning_rate: 1e-4\n")
    )
    (project / "params.yaml").write_text(text)
    assert params.load()["finetune"]["learning_rate"] == 1e-4


def test_every_public_key_is_documented_by_the_schema_and_stands_in_params():
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    sections = params.schema()["properties"]
    assert {name: list(rule["properties"]) for name, rule in sections.items()} == {
        name: list(section) for name, section in values.items()
    }


def test_a_stage_sees_the_parameters_it_declares_and_no_others(project):
    split = params.for_stage("split")
    assert split.data.shots == 5
    with pytest.raises(BobError, match=r"stage split reads the parameter generate"):
        _ = split.generate
    generate = params.for_stage("generate")
    assert generate.finetune.base_model == "models/miniature-base"
    with pytest.raises(BobError, match=r"finetune\.rank.*stages\.generate\.params"):
        _ = generate.finetune.rank


@pytest.mark.parametrize("written", ["captioner", '"captioner"', "'captioner'"])
def test_a_text_is_replaced_and_nothing_else_of_the_file(project, written):
    path = project / "params.yaml"
    text = path.read_text().replace("bank: captioner #", f"bank: {written} # \u00e4,")
    path.write_text(text)
    params.replace({"caption.bank": "data/contexts/a.jsonl"})
    assert path.read_text() == text.replace(f"bank: {written} #", "bank: data/contexts/a.jsonl #")
    assert params.load()["caption"]["bank"] == "data/contexts/a.jsonl"


@pytest.mark.parametrize("written", [">-\n    captioner", "&name captioner", "!!str captioner"])
def test_a_text_that_cannot_be_replaced_safely_is_let_be(project, written):
    path = project / "params.yaml"
    text = path.read_text().replace("bank: captioner #", f"bank: {written}\n  #")
    path.write_text(text)
    with pytest.raises(BobError, match=r"set caption\.bank to data/contexts/a\.jsonl yourself"):
        params.replace({"caption.bank": "data/contexts/a.jsonl"})
    assert path.read_text() == text


def test_numbers_texts_and_lists_are_replaced_with_their_comments_kept(project):
    path = project / "params.yaml"
    text = path.read_text().replace("\n", "\r\n")
    path.write_bytes(text.encode())
    changes = {"finetune.learning_rate": 1e-5, "classify.seeds": [0], "generate.sampler": "pndm"}
    params.replace(changes | {"generate.context": "none"})
    expected = (
        text.replace("learning_rate: 1e-3", "learning_rate: 1e-05")
        .replace("seeds: [0, 1, 2]", "seeds: [0]")
        .replace("sampler: dpmsolver++", "sampler: pndm")
        .replace("context: bank", "context: none")
    )
    assert path.read_bytes().decode() == expected
    assert params.load()["finetune"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("none", "none"),
        ("true", '"true"'),
        ("1", '"1"'),
        (0.1, "0.1"),
        (True, "true"),
        ("~", '"~"'),
    ],
)
def test_a_value_is_written_as_yaml_reads_it(value, written):
    assert params.written(value) == written
    assert YAML(typ="safe").load(written) == value


def test_the_command_line_ends_with_one_line_and_status_1(project):
    change(project, "data", "shots", "five")
    result = subprocess.run(
        [sys.executable, "-m", "bob", "split"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: params.yaml: data.shots")
    assert result.stderr.count("\n") == 1


def test_help_does_not_import_torch():
    code = (
        "import sys; from click.testing import CliRunner; from bob.cli import cli;"
        "assert CliRunner().invoke(cli, ['--help']).exit_code == 0;"
        "heavy = {'torch', 'diffusers', 'transformers', 'timm', 'numpy', 'PIL'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_interpreter_is_told_in_one_line(project):
    """-S leaves site-packages out, as the system's python does when nothing is activated."""
    result = subprocess.run(
        [sys.executable, "-S", "-m", "bob", "draw"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 1
    assert "source .venv/bin/activate" in result.stderr
    assert result.stderr.count("\n") == 1
