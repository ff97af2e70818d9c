"""What the stock libraries' files want beyond what the libraries write."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer


def merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The pairs a byte-pair encoding merges, in order."""
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


def write_vocabulary(tokenizer: Tokenizer, folder: Path) -> None:
    """Beside tokenizer.json, the two files that older readers of a BPE want."""
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    text = json.dumps(vocabulary, ensure_ascii=False)
    (folder / "vocab.json").write_text(text + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges(tokenizer))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def declare_float32(config: Path) -> None:
    """Let transformers compute in fp32 with weights that are only stored in fp16."""
    values = json.loads(config.read_text("utf-8"))
    values["dtype"] = "float32"
    for key in ("text_config", "vision_config"):
        if key in values:
            values[key]["dtype"] = "float32"
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
