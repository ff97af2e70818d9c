"""`params.yaml`: read, checked against its JSON schema, and handed out a stage at a time."""

import difflib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from bob.errors import BobError

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")


class Params:
    """A read-only view of the parameters that one stage declares, as `params.generate.steps`.

    Raises BobError for a key that exists but is not declared by the stage in `dvc.yaml`: DVC would
    not rerun the stage when it changes.
    """

    def __init__(self, values: Mapping[str, Any], stage: str, path: str = "") -> None:
        self._values, self._stage, self._path = values, stage, path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        key = f"{self._path}{name}"
        if name not in self._values:
            raise BobError(
                f"stage {self._stage} reads the parameter {key}, which its entry in {PIPELINE} "
                f"does not declare; add it under stages.{self._stage}.params"
            )
        value = self._values[name]
        return Params(value, self._stage, f"{key}.") if isinstance(value, Mapping) else value


def schema() -> dict[str, Any]:
    """The JSON schema of `params.yaml`."""
    return json.loads(resources.files("bob").joinpath("params.schema.json").read_text("utf-8"))


def load() -> dict[str, Any]:
    """Read and validate `params.yaml`.

    Raises BobError with one line: the key's path, what was found, what is allowed, and the nearest
    key where it looks like a typo.
    """
    values = _read_yaml(PARAMS)
    error = next(iter(_by_place(Draft202012Validator(schema()).iter_errors(values))), None)
    if error is not None:
        raise BobError(f"{PARAMS}: {explain(error)}")
    return values


def for_stage(stage: str) -> Params:
    """The validated parameters that `stage` declares in `dvc.yaml`, and no others."""
    values = load()
    pipeline = _read_yaml(PIPELINE)
    selected: dict[str, Any] = {}
    for key in pipeline["stages"][stage].get("params", []):
        source, target = values, selected
        *sections, last = key.split(".")
        for section in sections:
            source, target = source[section], target.setdefault(section, {})
        target[last] = source[last]
    return Params(selected, stage)


def explain(error: ValidationError) -> str:
    """One line for one schema error."""
    path = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        unknown = next(key for key in error.instance if key not in known)
        near = difflib.get_close_matches(str(unknown), known, n=1)
        prefix = f"{path}." if path else ""
        hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"{prefix}{unknown} is not a parameter; {hint}"
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        allowed = allowed_values(error.schema["properties"][missing])
        return f"{path + '.' if path else ''}{missing} is missing; allowed: {allowed}"
    found = json.dumps(error.instance, ensure_ascii=False, default=str)
    return f"{path} is {found}; allowed: {allowed_values(error.schema)}"


_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a section of parameters",
}


def allowed_values(rule: Mapping[str, Any]) -> str:
    """Plain words for what a schema rule allows."""
    if "anyOf" in rule:
        return " or ".join(allowed_values(option) for option in rule["anyOf"])
    if "enum" in rule:
        return ", ".join(map(str, rule["enum"]))
    if "const" in rule:
        return str(rule["const"])
    if "pattern" in rule:
        return rule.get("description", f"text like {rule['pattern']}")
    words = _TYPES[rule["type"]]
    if rule["type"] == "array":
        return f"{words} of at least {rule.get('minItems', 0)} of: {allowed_values(rule['items'])}"
    if "minimum" in rule:
        words += f" from {rule['minimum']}"
    if "exclusiveMinimum" in rule:
        words += f" above {rule['exclusiveMinimum']}"
    if "maximum" in rule:
        words += f" to {rule['maximum']}"
    if "exclusiveMaximum" in rule:
        words += f" below {rule['exclusiveMaximum']}"
    return words


def _by_place(errors: Iterator[ValidationError]) -> list[ValidationError]:
    # A misspelt key is also a missing one; the misspelling is what the user wants to hear about.
    return sorted(errors, key=lambda error: (error.validator == "required", str(error.json_path)))


def _read_yaml(path: Path) -> dict[str, Any]:
    # The parser DVC uses: YAML 1.2, where 1e-4 is a number (PyYAML makes it text).
    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BobError(
            f"{path} is not in {Path.cwd()}; run from the folder that holds dvc.yaml"
        ) from None
    except YAMLError as error:
        raise BobError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise BobError(f"{path}: sections of parameters were expected, found {values!r}")
    return values
