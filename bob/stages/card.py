"""Stage `card`: the model card of the exported classifier, written from what the run measured.

A stage of its own, because it tells of the evaluation, the export and the benchmark, which do not
depend on each other, and because a word changed in it is to measure nothing again.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import click
from huggingface_hub import metadata_load
from scipy.stats import binomtest

from bob.errors import BobError
from bob.formats import layout
from bob.formats.files import read_json, replacing_file, sha256
from bob.formats.manifest import Generated, passed_over_of, read_manifest
from bob.formats.params import Params
from bob.formats.photos import read_photos

VARIANT = "real_and_synthetic"  # the one that is exported
CONFUSIONS = 10
SETTINGS = {
    "data": ("name", "shots", "imbalance", "seed"),
    "caption": ("bank", "model"),
    "finetune": ("base_model", "context", "rank", "learning_rate", "epochs", "batch_size", "seed"),
    "generate": (
        *("context", "images_per_class", "guidance_scale", "steps", "sampler", "precision", "seed"),
    ),
    "classify": (
        *("backbone", "lora_rank", "real_weight", "mix", "learning_rate", "layer_decay"),
        *("weight_decay", "epochs", "batch_size", "precision", "seeds"),
    ),
}
FINE_TUNED = {
    "caption": "with the background and the pose of each photo in its caption",
    "none": "with captions that name the class alone",
}
GENERATED = {
    "bank": "contexts drawn at random from those of all classes, whatever the class",
    "class": "contexts drawn at random from those of the same class",
    "none": "no context in the prompt",
}
LICENCE_FIELDS = ("license", "license_name", "license_link", "base_model")
Row = Sequence[object]


def run(params: Params) -> None:
    """Write `results/export/README.md`."""
    trained = read_json(layout.CLASSIFY / "classifier.json")
    named = _named(trained["best_seed"][VARIANT])
    right = sum(actual == predicted for actual, predicted in named)
    accuracy, onnx = read_json(layout.ACCURACY_METRICS), read_json(layout.ONNX_METRICS)
    sections = [
        _head(trained, right, len(named)),
        _data(trained["classes"], params),
        _method(trained, params),
        _accuracy(named, accuracy, onnx),
        _confusions(named),
        _latency(onnx),
        *_precisions(onnx),
        _models(params),
        _use(trained),
    ]
    with replacing_file(layout.CARD) as path:
        path.write_text("\n".join(sections), encoding="utf-8")
    click.echo(f"card: {layout.CARD}, top-1 {_interval(right, len(named))} on test")


def _named(seed: int) -> list[tuple[str, str]]:
    """The class of each test photo, and the one that the classifier of `seed` names."""
    path = layout.EVALUATE / "predictions" / f"{VARIANT}.csv"
    if not path.is_file():
        raise BobError(f"{path} is missing; `dvc repro evaluate` makes it")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["seed"] == str(seed)]
    return [(row["actual"], row["predicted"]) for row in rows]


# --- sections -----------------------------------------------------------------------------------


def _head(trained: dict[str, Any], right: int, count: int) -> str:
    descriptor, classes = trained["descriptor"], trained["classes"]
    return f"""---
library_name: onnx
pipeline_tag: image-classification
---

# Classifier of {len(classes)} classes of {descriptor}

`{layout.ONNX.name}` names the {descriptor} in a photo, one of: {", ".join(classes)}. It is right
on {_interval(right, count)} of {count} test photos. SHA-256: `{sha256(layout.ONNX)}`.

It names one of its classes for every photo, also for one that shows none of them. Its probabilities
(softmax) are not calibrated. On photos unlike those of the test, of another camera or place, it may
be right less often.
"""


def _data(classes: Sequence[str], params: Params) -> str:
    counts = [
        Counter(photo.class_name for photo in read_photos(path))
        for path in (layout.TRAIN, layout.VAL, layout.TEST)
    ]
    generated = read_manifest(layout.GENERATED)
    counts.append(Counter(image.class_name for image in generated))
    rows: list[Row] = [(name, *(count[name] for count in counts)) for name in classes]
    rows.append(("**all**", *(count.total() for count in counts)))
    header = ("class", "training", "validation", "test", "generated")
    return f"""## Data

Photos of the dataset `{params.data.name}`, and images generated for training. None of them is in
this folder. Nothing was chosen by the test photos.{_rejected(generated)}

{_table(header, rows)}
"""


def _rejected(generated: Sequence[Generated]) -> str:
    """How many images a person has rejected: their numbers are missing, the next have come in."""
    rejected = passed_over_of(generated).total()
    if not rejected:
        return ""
    return f" Generated images that a person has rejected and that others replace: {rejected}."


def _method(trained: dict[str, Any], params: Params) -> str:
    seed = trained["best_seed"][VARIANT]
    kept = trained["validation"][VARIANT][str(seed)]
    chosen = (
        "the last epoch of the first seed, since there are no validation photos"
        if kept["top1"] is None
        else f"the best on validation: seed {seed}, epoch {kept['epoch']}, {kept['top1']:.2f} %"
    )
    rows = [
        (f"`{section}`", ", ".join(f"{key} {_value(params, section, key)}" for key in keys))
        for section, keys in SETTINGS.items()
    ]
    return f"""## Method and settings

Made with the pipeline of [BOB](https://arxiv.org/abs/2510.24078). {_training(params)} Of the
classifiers of seeds {", ".join(map(str, trained["seeds"]))} this is {chosen}.

{_table(("section of `params.yaml`", "values"), rows)}
"""


def _training(params: Params) -> str:
    if params.generate.images_per_class == 0:
        return "The backbone was trained on the training photos; no image was generated."
    tuned = (
        f"was fine-tuned on the training photos, {FINE_TUNED[params.finetune.context]}"
        if params.finetune.epochs
        else "was taken as it is"
    )
    context = params.generate.context
    drawn = GENERATED.get(context, f"contexts drawn at random from `{context}`")
    return (
        f"The text-to-image model {tuned}. It generated images of each class, with {drawn}. The "
        "backbone was trained on the photos and these images."
    )


def _accuracy(
    named: Sequence[tuple[str, str]], accuracy: dict[str, Any], onnx: dict[str, Any]
) -> str:
    rows: list[Row] = []
    for name, count in sorted(Counter(actual for actual, _ in named).items()):
        right = named.count((name, name))
        rows.append((name, count, right, _interval(right, count)))
    right = sum(actual == predicted for actual, predicted in named)
    rows.append(("**all**", len(named), right, _interval(right, len(named))))
    both, real = accuracy[VARIANT], accuracy["real_only"]
    return f"""## Accuracy

Top-1 on the test photos; in brackets the 95 % interval (Wilson), which takes the photos for
independent. ONNX Runtime, on all of them: {onnx["top1"]} %.

{_table(("class", "photos", "right", "top-1"), rows)}

Mean over all seeds: {both["top1"]} % (standard deviation {both["top1_std"]}). Trained on the real
photos alone: {real["top1"]} % ({real["top1_std"]}).
"""


def _confusions(named: Sequence[tuple[str, str]]) -> str:
    counts = Counter(actual for actual, _ in named)
    wrong = Counter(pair for pair in named if pair[0] != pair[1])
    ranked = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))
    rows = [
        (actual, predicted, f"{count} of {counts[actual]}")
        for (actual, predicted), count in ranked[:CONFUSIONS]
    ]
    text = f"The most frequent of {wrong.total()} errors on the test photos." if rows else "None."
    table = f"\n{_table(('class', 'taken for', 'photos'), rows)}\n" if rows else ""
    return f"## Confusions\n\n{text}\n{table}"


def _latency(onnx: dict[str, Any]) -> str:
    sizes = _batch_sizes(onnx)
    columns = ("p50_ms", "p95_ms", "p99_ms", "images_per_second")
    rows = [(size, *(onnx[f"batch_{size}"][column] for column in columns)) for size in sizes]
    gpu = "" if onnx["gpu"] == "none" else f", {onnx['gpu']}"
    header = ("batch", "median ms", "95 % below, ms", "99 % below, ms", "images/s")
    return f"""## Latency

ONNX Runtime {onnx["onnxruntime"]}, {onnx["provider"]}, {onnx["processor"]}{gpu}, threads:
{onnx["threads"]}. From a normalised batch to logits: reading and resizing photos is not in it. The
file has {onnx["model_mb"]} MB.

{_table(header, rows)}
"""


def _batch_sizes(onnx: dict[str, Any]) -> list[int]:
    return sorted(int(key.removeprefix("batch_")) for key in onnx if key.startswith("batch_"))


def _precisions(onnx: dict[str, Any]) -> list[str]:
    """The section on the files of fewer bits, where there was to be one."""
    reduced = [precision for precision in layout.PRECISIONS if precision in onnx]
    if not reduced:
        return []
    sizes = _batch_sizes(onnx)
    rows: list[Row] = []
    for name, values in [("fp32", onnx), *((precision, onnx[precision]) for precision in reduced)]:
        path = layout.ONNX if name == "fp32" else layout.reduced_onnx(name)
        if "top1" not in values:
            rows.append((name, "none: does not survive", *("" for _ in range(2 + len(sizes)))))
            continue
        rates = (values[f"batch_{size}"]["images_per_second"] for size in sizes)
        file = f"`{path.relative_to(layout.EXPORT)}`"
        rows.append((name, file, values["model_mb"], f"{values['top1']} %", *rates))
    header = ("precision", "file", "MB", "top-1", *(f"images/s, batch {size}" for size in sizes))
    return [
        f"""## Precisions

The same classifier in fewer bits, used in the same way: `predict.py --model FILE`. Top-1 is on the
test photos, images/s on the machine above. int8 was calibrated on training images. fp16 is for
GPUs: a CPU computes most of it in float32.

{_table(header, rows)}
"""
    ]


def _models(params: Params) -> str:
    used = {"backbone": params.classify.backbone, "text-to-image": params.finetune.base_model}
    if params.caption.bank == "captioner":
        used["captioner"] = params.caption.model
    rows = [(role, f"`{folder}`", licence_of(Path(folder))) for role, folder in used.items()]
    return f"""## Licences

What the cards of the models that made this classifier say of their licence. Whether it reaches to
what is made with them, and what the photos' own licence allows, is for you to judge.

{_table(("model", "folder", "licence"), rows)}
"""


def licence_of(model: Path) -> str:
    """The licence fields in the header of a model's card, `README.md`, as they stand there."""
    card = model / "README.md"
    if not card.is_file():
        return "no card"
    try:
        header = metadata_load(card) or {}
    except Exception:  # whatever its parser of YAML raises
        return "its card's header cannot be read"
    fields = [f"{key}: {header[key]}" for key in LICENCE_FIELDS if header.get(key)]
    return ", ".join(fields) or "not stated"


def _use(trained: dict[str, Any]) -> str:
    preprocessing = trained["preprocessing"]
    height, width = preprocessing["size"]
    return Template(USE).substitute(
        classes=json.dumps(trained["classes"], ensure_ascii=False),
        resizing=resizing(preprocessing),
        height=height,
        width=width,
        mean=", ".join(map(str, preprocessing["mean"])),
        std=", ".join(map(str, preprocessing["std"])),
    )


def resizing(preprocessing: Mapping[str, Any]) -> str:
    """What becomes of a photo before its pixels are normalised, in words."""
    height, width = preprocessing["size"]
    tall, wide = (math.floor(side / preprocessing["crop_pct"]) for side in (height, width))
    how = {
        "squash": f"resized to {tall} x {wide} pixels whatever its shape",
        "border": f"resized to fit into {tall} x {wide} pixels",
    }.get(preprocessing["crop_mode"], f"resized to just cover {tall} x {wide} pixels")
    ground = ", the rest being (124, 116, 104)" if preprocessing["crop_mode"] == "border" else ""
    return (
        f"{how} (height x width; {preprocessing['interpolation']}, antialiased, as Pillow does "
        f"it); then the central {height} x {width} pixels{ground}"
    )


# --- text ---------------------------------------------------------------------------------------


def _interval(right: int, count: int) -> str:
    low, high = binomtest(right, count).proportion_ci(method="wilson")
    return f"{100 * right / count:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _value(params: Params, section: str, key: str) -> object:
    return getattr(getattr(params, section), key)


def _table(header: Sequence[str], rows: Iterable[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


USE = """## Use

Input `image`: float32 [batch, 3, $height, $width]. A photo is decoded, turned upright by its EXIF
orientation, made RGB, $resizing. Each channel, from 0 to 1: minus the mean ($mean), divided by the
standard deviation ($std). Output `logits`: float32 [batch, classes]. The metadata of the file says
the same (`classes`, `preprocessing`), as JSON.

### Python

`predict.py` in this folder does all of it, bit for bit as the classifier was evaluated. It needs
numpy, Pillow and onnxruntime.

```console
$$ python predict.py --top 3 --format csv photos/ 'more/*.jpg' photo.jpg
```

```python
from predict import Classifier

for prediction in Classifier("classifier.onnx").predict(["photo.jpg"], top=3):
    print(prediction.photo, prediction.top, prediction.error)
```

The programs below read the pixels of a resized and cropped photo, $height x $width x 3 bytes. Other
libraries resize otherwise than Pillow, and that moves the logits; to compare, write the pixels:

```python
from pathlib import Path

from predict import Classifier, open_photo, resize_and_crop

image = resize_and_crop(open_photo("photo.jpg"), Classifier("classifier.onnx").preprocessing)
Path("photo.rgb").write_bytes(image.tobytes())
```

### C++

```cpp
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <fstream>
#include <iostream>
#include <iterator>
#include <vector>

int main() {
  constexpr int64_t height = $height, width = $width, area = height * width;
  const float mean[] = {$mean}, deviation[] = {$std};

  std::ifstream file("photo.rgb", std::ios::binary);
  const std::vector<char> rgb{std::istreambuf_iterator<char>(file), {}};
  std::vector<float> image(3 * area);
  for (int64_t i = 0; i < 3 * area; ++i) {
    const int64_t pixel = i / 3, channel = i % 3;
    const float value = static_cast<unsigned char>(rgb.at(i)) / 255.0f;
    image[channel * area + pixel] = (value - mean[channel]) / deviation[channel];
  }

  Ort::Env environment;
  Ort::Session session(environment, "classifier.onnx", Ort::SessionOptions{});
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t shape[] = {1, 3, height, width};
  const auto input =
      Ort::Value::CreateTensor<float>(memory, image.data(), image.size(), shape, 4);
  const char* inputs[] = {"image"};
  const char* outputs[] = {"logits"};
  const auto result = session.Run(Ort::RunOptions{}, inputs, &input, 1, outputs, 1);

  const float* logits = result[0].GetTensorData<float>();
  const size_t count = result[0].GetTensorTypeAndShapeInfo().GetElementCount();
  Ort::AllocatorWithDefaultOptions allocator;
  const auto classes =
      session.GetModelMetadata().LookupCustomMetadataMapAllocated("classes", allocator);
  const auto best = std::max_element(logits, logits + count) - logits;
  std::cout << "number " << best << " of " << classes.get() << "\\n";
}
```

### JavaScript

```js
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-node"; // in a browser: onnxruntime-web, with the same calls

const classes = $classes;
const area = $height * $width, mean = [$mean], deviation = [$std];

const rgb = readFileSync("photo.rgb");
const image = new Float32Array(3 * area);
for (let i = 0; i < 3 * area; i++) {
  const pixel = Math.floor(i / 3), channel = i % 3;
  image[channel * area + pixel] = (rgb[i] / 255 - mean[channel]) / deviation[channel];
}

const session = await ort.InferenceSession.create("classifier.onnx");
const input = new ort.Tensor("float32", image, [1, 3, $height, $width]);
const { logits } = await session.run({ image: input });
console.log(classes[logits.data.indexOf(Math.max(...logits.data))]);
```
"""
