"""Loading a model's folder whole or not at all, and how to say what libraries raise at it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

# What timm, transformers and safetensors raise at files that do not belong together.
LOADING_ERRORS = (
    *(KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError),
    *(OSError, SafetensorError),
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and diffusers from telling in many lines what is told here in one."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def load_checked(kind: Any, folder: Path, **settings: Any) -> Any:
    """A network of a class of diffusers or transformers, every weight of it from `folder`.

    `settings` are more arguments of the class's `from_pretrained`. Raises what that raises, one of
    LOADING_ERRORS, and ValueError where the network is not what its file of weights holds, or holds
    a NaN: the libraries leave a weight that is missing, or of another shape, random.
    """
    from transformers.utils import logging  # late: timm's networks need none of it

    logging.disable_progress_bar()  # a bar for one file is noise beside the stage's own
    with quiet():
        network, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **settings,
        )
    _check_complete(report)
    check_finite(network)
    return network


def _check_complete(report: Mapping[str, Any]) -> None:
    absent = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if absent:
        raise ValueError(f"its weights have no fitting {absent[0]}{_more(absent)}")
    if surplus := sorted(report["unexpected_keys"]):
        raise ValueError(
            f"its weights have {surplus[0]}{_more(surplus)}, which its config.json has no place for"
        )


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def check_finite(network: nn.Module) -> None:
    """Raise ValueError naming a weight, or a buffer as a norm's mean, that is not finite."""
    for name, weight in network.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"its weight {name} holds a NaN or an infinity")


def reason_of(error: Exception) -> str:
    """The start of an error's message in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(map(str.strip, lines[:2]))
