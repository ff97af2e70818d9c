"""What libraries raise at model folders that do not load, and how to say it."""

from safetensors import SafetensorError

# What timm, transformers and safetensors raise at files that do not belong together.
LOADING_ERRORS = (
    *(KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError),
    *(OSError, SafetensorError),
)


def reason_of(error: Exception) -> str:
    """The start of an error's message in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(map(str.strip, lines[:2]))
