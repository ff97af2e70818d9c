"""`params.yaml`: read, checked against its JSON schema, and handed out a stage at a time."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from bob.errors import BobError, shown
from bob.formats.files import replacing_file

PARAMS = Path("params.yaml")
PIPELINE = Path("dvc.yaml")
YAML_SIZE = 1_000_000  # characters that are read, and values, as aliases repeat them


def _is_whole(_: object, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(_: object, value: object) -> bool:
    return _is_whole(_, value) or (isinstance(value, float) and math.isfinite(value))


# In JSON schema 2.0 is an integer; no count of anything is 2.0 in Python. Infinity is above every
# minimum, and NaN is not below it.
_Validator = extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": _is_whole, "number": _is_finite}
    ),
)


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
    return json.loads(
        resources.files("bob.formats").joinpath("params.schema.json").read_text("utf-8")
    )


def load(file: Path = PARAMS) -> dict[str, Any]:
    """Read and validate `params.yaml`, or a `file` that stands for it.

    Raises BobError with one line: the key's path, what was found, what is allowed, and the nearest
    key where it looks like a typo.
    """
    values = read_yaml(file)
    check(PARAMS, values, schema())
    return values


def for_stage(stage: str) -> Params:
    """The validated parameters that `stage` declares in `dvc.yaml`, and no others."""
    pipeline = read_yaml(PIPELINE)
    check(PIPELINE, pipeline, _pipeline_rules(stage))
    declared = pipeline["stages"][stage].get("params", [])
    return Params(select(load(), declared, stage), stage)


def _pipeline_rules(stage: str) -> dict[str, Any]:
    """The JSON schema of as much of `dvc.yaml` as a stage reads; DVC has one of all of it."""
    keys = {
        "type": "array",
        "items": {"type": "string"},
        "description": f"a list of keys of {PARAMS}",
    }
    entry = {
        "type": "object",
        "properties": {"params": keys},
        "description": "the stage, as DVC describes it",
    }
    stages = {
        "type": "object",
        "required": [stage],
        "properties": {stage: entry},
        "description": "a mapping of stages",
    }
    return {"type": "object", "required": ["stages"], "properties": {"stages": stages}}


def replace(changes: Mapping[str, Any]) -> None:
    """Set parameters (section.key -> value) in `params.yaml`; all else stays to the byte.

    Raises BobError where the file is written in a way that this would not be safe in.
    """
    with PARAMS.open(encoding="utf-8", newline="") as file:
        changed = edited(file.read(), changes)
    with replacing_file(PARAMS) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        file.write(changed)


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """`text`, that of a `params.yaml`, with parameters set as `replace` does."""
    values = YAML(typ="safe").load(text)
    places = {
        f"{section.value}.{key.value}": node
        for section, keys in YAML().compose(text).value
        for key, node in keys.value
    }
    changed, safe = text, True
    for key in sorted(changes, key=lambda key: places[key].start_mark.index, reverse=True):
        place = places[key]
        start, end = place.start_mark.index, place.end_mark.index
        block = isinstance(place, SequenceNode) and not place.flow_style
        # Of an anchor, a tag or a block, more than the value would change.
        safe = safe and not block and text[start] not in "&!*|>"
        changed = changed[:start] + written(changes[key]) + changed[end:]
        section, _, name = key.partition(".")
        values[section][name] = changes[key]
    with suppress(YAMLError):
        if safe and YAML(typ="safe").load(changed) == values:
            return changed
    by_hand = ", ".join(f"{key} to {written(value)}" for key, value in changes.items())
    raise BobError(f"{PARAMS} cannot be changed safely; set {by_hand} yourself")


def written(value: Any) -> str:
    """A value as YAML in one line; a text as it is, where it is read as that."""
    if isinstance(value, str) and re.fullmatch(r"[\w./+-]+", value):
        with suppress(YAMLError, ValueError):
            if YAML(typ="safe").load(value) == value:
                return value
    return json.dumps(value, ensure_ascii=False)


def select(values: Mapping[str, Any], keys: Iterable[str], stage: str) -> dict[str, Any]:
    """The part of `values` that `keys`, dotted, name; raises BobError for one that is not there."""
    selected: dict[str, Any] = {}
    for key in keys:
        source, target = values, selected
        *sections, last = key.split(".")
        try:
            for section in sections:
                source, target = source[section], target.setdefault(section, {})
            target[last] = source[last]
        except (KeyError, TypeError):
            raise BobError(f"{PARAMS} has no {key}; remove it from stages.{stage}.params") from None
    return selected


def check(path: Path | str, values: Any, rules: Mapping[str, Any]) -> None:
    """Check the content of the file at `path` against a JSON schema; raises BobError.

    `path` may say more of where it stands: "<path>, line <n>".
    """
    errors = list(_Validator(rules).iter_errors(values))
    if errors:
        # A misspelt key is also a missing one; the misspelling is what the user wants to hear of.
        first = min(errors, key=lambda error: (error.validator == "required", error.json_path))
        raise BobError(f"{path}: {_explain(first)}")


def _explain(error: ValidationError) -> str:
    # Typed loosely by jsonschema, for which `true` is a schema too.
    rule: Mapping[str, Any] = error.schema  # type: ignore[assignment]
    instance: Any = error.instance
    path = [str(part) for part in error.absolute_path]
    if error.validator == "additionalProperties":
        known = list(rule["properties"])
        unknown = shown(next(key for key in instance if key not in known))
        near = difflib.get_close_matches(unknown, known, n=1)
        hint = (
            f"did you mean {'.'.join([*path, near[0]])}?"
            if near
            else f"known here: {', '.join(known)}"
        )
        return f"{'.'.join([*path, unknown])} is not a known key; {hint}"
    if error.validator == "required":
        missing = next(key for key in rule["required"] if key not in instance)
        allowed = _allowed(rule["properties"][missing])
        return f"{'.'.join([*path, missing])} is missing; allowed: {allowed}"
    where = shown(".".join(path) or "the content")
    if isinstance(instance, float) and not math.isfinite(instance):
        return f"{where} is no finite number; allowed: {_allowed(rule)}"
    found = json.dumps(instance, ensure_ascii=False, default=str, skipkeys=True)
    return f"{where} is {shown(found)}; allowed: {_allowed(rule)}"


_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a section of parameters",
}


def _allowed(rule: Mapping[str, Any]) -> str:
    """Plain words for what a schema rule allows."""
    if "description" in rule:
        return rule["description"]
    if "anyOf" in rule:
        return " or ".join(_allowed(option) for option in rule["anyOf"])
    if "enum" in rule:
        return ", ".join(map(str, rule["enum"]))
    if "const" in rule:
        return str(rule["const"])
    if "pattern" in rule:
        return f"text like {rule['pattern']}"
    words = _TYPES[rule["type"]]
    if rule["type"] == "array":
        return f"{words} of at least {rule.get('minItems', 0)} of: {_allowed(rule['items'])}"
    if "minimum" in rule:
        words += f" from {rule['minimum']}"
    if "exclusiveMinimum" in rule:
        words += f" above {rule['exclusiveMinimum']}"
    if "maximum" in rule:
        words += f" to {rule['maximum']}"
    if "exclusiveMaximum" in rule:
        words += f" below {rule['exclusiveMaximum']}"
    return words


def read_yaml(path: Path) -> Any:
    """Read a YAML 1.2 file with DVC's own parser: 1e-4 is a number (for PyYAML it is text)."""
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > YAML_SIZE:
            raise BobError(f"{path}: longer than {YAML_SIZE:,} characters")
        if "*" in text:
            _check_aliases(path, YAML(typ="safe").compose(text))
        return YAML(typ="safe").load(text)
    except FileNotFoundError:
        raise BobError(
            f"{path} is not in {Path.cwd()}; run from the folder that holds dvc.yaml"
        ) from None
    except YAMLError as error:
        raise BobError(f"{path}: not YAML ({shown(' '.join(str(error).split()), 400)})") from None
    except RecursionError:
        raise BobError(f"{path}: not YAML that bob reads (it is nested too deeply)") from None
    except UnicodeDecodeError:
        raise BobError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise BobError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # of a number with thousands of digits, of a 13th month
        where = "".join(f"{key} is " for key in _unreadable(text))
        raise BobError(f"{path}: {where}not what YAML allows ({shown(error)})") from None


def _check_aliases(path: Path, root: Node | None) -> None:
    """Raise BobError where the aliases of a YAML document make too many values of it."""
    sizes: dict[int, int] = {}

    def size(node: Node, key: str) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = YAML_SIZE  # of one that is a part of itself
            sizes[id(node)] = 1 + sum(size(part, name) for name, part in _parts(node, key))
            if sizes[id(node)] > YAML_SIZE:
                raise BobError(
                    f"{path}: {shown(key or 'the content')} is more than {YAML_SIZE:,} values, as "
                    "its aliases (*) repeat them; write it without"
                )
        return sizes[id(node)]

    if root is not None:
        size(root, "")


def _parts(node: Node, key: str) -> Iterator[tuple[str, Node]]:
    """The nodes right under one, with their dotted keys."""
    if isinstance(node, MappingNode):
        for name, value in node.value:
            yield key, name
            yield f"{key}.{name.value}".removeprefix("."), value
    elif isinstance(node, SequenceNode):
        for number, value in enumerate(node.value):
            yield f"{key}.{number}".removeprefix("."), value


def _unreadable(text: str) -> list[str]:
    """The dotted key of the first plain value that cannot be read alone."""

    def search(node: Node, key: str) -> Iterator[str]:
        if isinstance(node, ScalarNode):
            try:
                YAML(typ="safe").load(node.value)
            except (ValueError, YAMLError):
                yield shown(key)
        for name, part in _parts(node, key):
            yield from search(part, name)

    return list(search(YAML(typ="safe").compose(text), ""))[:1]
