"""Where every stage writes, relative to the project root.

None of these paths is built from a parameter: DVC deletes what lies at an output's path before it
runs the stage, so a path that a user can set could delete the user's own files.
"""

from pathlib import Path

MINIATURE = Path("data/miniature")

SPLIT = Path("results/split")
CLASSES = SPLIT / "classes.json"
TRAIN = SPLIT / "train.jsonl"
VAL = SPLIT / "val.jsonl"
TEST = SPLIT / "test.jsonl"

CAPTION = Path("results/caption")
BANK = CAPTION / "bank.jsonl"

FINETUNE = Path("results/finetune")
LORA = FINETUNE / "lora"

GENERATE = Path("results/generate")
GENERATED = GENERATE / "metadata.jsonl"  # the name that `datasets` looks for

# Which items of the item cache the stages used. Nothing depends on these: they name
# who really made an item, which may change where the item itself comes out the same.
ITEMS = Path("results/items")
CAPTION_ITEMS = ITEMS / "caption.jsonl"
FINETUNE_ITEMS = ITEMS / "finetune.jsonl"
GENERATED_ITEMS = ITEMS / "generate.jsonl"
CLASSIFY_ITEMS = ITEMS / "classify.jsonl"

CLASSIFY = Path("results/classify")
EVALUATE = Path("results/evaluate")
AUDIT = Path("results/audit")
AUDITED = AUDIT / "generated.jsonl"
CLUSTERS = AUDIT / "clusters.json"
EXPORT = Path("results/export")
ONNX = EXPORT / "classifier.onnx"
PREDICT = EXPORT / "predict.py"
PRECISIONS = ("fp16", "int8")  # beside fp32
REDUCED = EXPORT / "reduced"  # the same classifier in fewer bits
PRECISION_CHECKS = REDUCED / "checks.json"
CARD = EXPORT / "README.md"
BENCHMARK = Path("results/benchmark")
REPORT = Path("results/report")

ACCURACY_METRICS = Path("metrics/accuracy.json")
SYNTHETIC_METRICS = Path("metrics/synthetic.json")
ONNX_METRICS = Path("metrics/onnx.json")

# Where a user's own files of contexts live. One fixed folder, because DVC has to know of it before
# it knows what `generate.context` says.
CONTEXTS = Path("data/contexts")

# What people have decided about generated images; any file of the folder counts.
REVIEW = Path("data/review")


def reduced_onnx(precision: str) -> Path:
    """The classifier in one of PRECISIONS; it is there where it survived."""
    return REDUCED / f"classifier.{precision}.onnx"
