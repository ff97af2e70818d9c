"""What others write, held to a JSON schema and told in a line where it does not fit."""

import difflib
import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bob.errors import BobError, shown

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError


def check(path: Path | str, values: Any, rules: Mapping[str, Any]) -> None:
    """Check the content of the file at `path` against a JSON schema; raises BobError.

    `path` may say more of where it stands: "<path>, line <n>".
    """
    errors = list(_validator()(rules).iter_errors(values))
    if errors:
        # A misspelt key is also a missing one; the misspelling is what the user wants to hear of.
        first = min(errors, key=lambda error: (error.validator == "required", error.json_path))
        raise BobError(f"{path}: {_explain(first)}")


def _explain(error: "ValidationError") -> str:
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
        return ", ".join(v if isinstance(v, str) else json.dumps(v) for v in rule["enum"])
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


@cache
def _validator() -> Any:
    # Late: a machine that only makes items reads nothing that is checked, and may lack jsonschema.
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend

    # In JSON schema 2.0 is an integer; no count of anything is 2.0 in Python. Infinity is above
    # every minimum, and NaN is not below it.
    return extend(
        Draft202012Validator,
        type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many(
            {"integer": _is_whole, "number": _is_finite}
        ),
    )


def _is_whole(_: object, value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(_: object, value: object) -> bool:
    return _is_whole(_, value) or (isinstance(value, float) and math.isfinite(value))
