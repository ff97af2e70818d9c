"""Of `bench.gpu`: training classifiers with and without their input, and ONNX Runtime."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.classifier_input import BATCH, PREPROCESSING, draw_images
from bench.gpu_setting import Figures, Setting
from bench.speed import seconds
from bob.formats.photos import Task
from bob.models import training
from bob.models.backbones import open_backbone, predict
from bob.models.preprocessing import Preprocessing

CLASSES = 100
TINY_SIDE = 32  # pixels
INPUT_SHARE = 0.1  # of a step, at most
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RECIPE = training.Recipe(
    lora_rank=0,
    real_weight=0.5,
    mix="cutmix",
    mix_probability=0.2,
    learning_rate=1e-4,
    layer_decay=1.0,
    weight_decay=1e-2,
    warmup_epochs=1,
    epochs=1,
    batch_size=BATCH // 2,
    precision="auto",
)
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
SIZES = (1, 32)
AGREEMENT = {"fp32": 0.99, "fp16": 0.95}  # of the images, the same class as torch, at least


@dataclass(frozen=True)
class Subject:
    """A classifier that is trained, and for what input."""

    build: Callable[[], nn.Module]
    kept: Callable[[nn.Module], nn.Module]
    """What it becomes."""
    preprocessing: Preprocessing


def _subjects(setting: Setting) -> dict[str, Subject]:
    """By name; the classifiers of full size are ResNet-50, ViT-B/16 and CLIP's with a LoRA."""
    from tests import builders

    networks: dict[str, dict[str, int]] = {"resnet50": {}, "vit_base_patch16_224": {}}
    preprocessing = PREPROCESSING
    if setting.tiny:
        networks = {"test_resnet": {}, "test_vit": {"img_size": TINY_SIDE}}
        preprocessing = replace(preprocessing, size=(TINY_SIDE, TINY_SIDE))
    subjects = {
        name: Subject(
            partial(timm.create_model, name, num_classes=CLASSES, **options),
            lambda model: model,
            preprocessing,
        )
        for name, options in networks.items()
    }
    b16: dict[str, Any] = {
        "vision_config": builders.CLIP_B16_VISION,
        "text_config": builders.CLIP_B16_TEXT,
        "projection_dim": 512,
        "resized": 224,
    }
    build_clip = partial(builders.build_clip, **{} if setting.tiny else b16)
    clip = open_backbone(setting.built("clip", build_clip))
    task = Task("bird", tuple(f"wren {number}" for number in range(CLASSES)))
    subjects["clip_lora"] = Subject(
        lambda: clip.trainable(task, 16), clip.classifier, clip.preprocessing
    )
    return subjects


def classifiers(setting: Setting) -> Figures:
    """A training step of 20 real and 20 synthetic images: with input and without, by layout."""
    folder = setting.scratch / "images"
    folder.mkdir()
    images = draw_images(folder, 10 if setting.tiny else 100, TINY_SIDE if setting.tiny else 512)
    figures: Figures = {"batch": BATCH, "precision": setting.auto, "wrong": []}
    for name, subject in _subjects(setting).items():
        sources = [
            training.TrainingImages(images, CLASSES, subject.preprocessing, setting.device)
            for _ in range(2)
        ]
        with_input = _step_seconds(setting, subject, sources)
        with _ready(setting, sources):
            alone = _step_seconds(setting, subject, sources)
            # The loop asks torch for it by name.
            with patch.object(torch, "channels_last", torch.contiguous_format):
                contiguous = _step_seconds(setting, subject, sources)
        share = max(0.0, 1 - alone / with_input)
        figures[name] = {
            "seconds_a_step": with_input,
            **setting.reached(_flops_of_step(setting, subject), with_input, setting.auto),
            "share_of_input": share,
            "seconds_without_input": alone,
            "seconds_without_input_contiguous": contiguous,
            "looking": _looking(setting, subject),
        }
        if share > INPUT_SHARE and not setting.tiny:
            figures["wrong"].append(f"{name}: input is {share:.0%} of a step")
    return figures


def _step_seconds(
    setting: Setting, subject: Subject, sources: list[training.TrainingImages]
) -> float:
    """Of the training loop itself: of long runs less short ones, which begin and end alike."""
    real, synthetic = sources

    def train(epochs: int) -> float:
        recipe = replace(RECIPE, epochs=epochs, precision=setting.auto)
        model, dtype = subject.build(), DTYPES[setting.auto]
        task = (model, subject.kept, real, synthetic, None, recipe, 0, setting.device, dtype)
        return seconds(lambda: training.train(*task))

    few, many = (1, 2) if setting.tiny else (2, 10)
    if not setting.tiny:
        train(1)  # to warm up
    steps = (many - few) * -(-len(real) // (BATCH // 2))
    return max(1e-9, (train(many) - train(few)) / steps)


def _ready(setting: Setting, sources: list[training.TrainingImages]) -> Any:
    """Let every step have the same batch, which lies ready on the device."""
    half = BATCH // 2
    random = torch.Generator().manual_seed(0)
    crops = [source.crops(torch.arange(half) % len(source), random) for source in sources]
    images, targets = (torch.cat(both).to(setting.device) for both in zip(*crops, strict=True))
    steps = -(-len(sources[0]) // half)
    return patch.object(
        training.Batches,
        "epoch",
        lambda self: itertools.repeat((images, targets, half), steps),
    )


def _example(setting: Setting, subject: Subject, count: int) -> torch.Tensor:
    return torch.randn(count, 3, *subject.preprocessing.size, device=setting.device)


def _flops_of_step(setting: Setting, subject: Subject) -> float:
    """Forward and backward; the texts of a CLIP are read once, however many images there are."""
    model = subject.build().to(setting.device)
    training.to_train_mode(model)

    def count(images: int) -> float:
        # The fused kernels of a CPU are not counted; those that they stand for are.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(_example(setting, subject, images)).sum().backward()
        return counter.get_total_flops()

    one, two = count(1), count(2)
    return one + (BATCH - 1) * (two - one)


def _looking(setting: Setting, subject: Subject) -> Figures:
    """Passes forward in full precision, as evaluation makes them."""
    model = subject.kept(subject.build()).eval().to(setting.device)
    batch = _example(setting, subject, 4 if setting.tiny else 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch)
    took = setting.median(lambda: predict(model, [batch], setting.device), 5)
    return {
        "images_per_second": len(batch) / took,
        **setting.reached(counter.get_total_flops(), took, "fp32"),
    }


# --- ONNX Runtime --------------------------------------------------------------------------------


def onnx(setting: Setting) -> Figures:
    """Which execution providers start, and what ResNet-50 does on them in fp32 and fp16."""
    import onnxruntime

    from bob.models.classifiers import Trained
    from bob.models.quantization import CONVERSIONS
    from bob.stages import benchmark, export

    torch.manual_seed(0)
    model = timm.create_model("test_resnet" if setting.tiny else "resnet50", num_classes=CLASSES)
    side = TINY_SIDE if setting.tiny else 224
    preprocessing = replace(PREPROCESSING, size=(side, side))
    images = torch.randn(max(SIZES), 3, *preprocessing.size)
    files = {name: setting.scratch / f"{name}.onnx" for name in ("fp32", "fp16")}
    trained = Trained("bird", tuple(map(str, range(CLASSES))), preprocessing, (0,), {})
    export.write_onnx(model.eval(), trained, files["fp32"])
    CONVERSIONS["fp16"][0](files["fp32"], files["fp16"], images[:16])
    torch.backends.cudnn.allow_tf32 = False  # as the sessions are set up
    expected = predict(model, [images], setting.device)
    figures: Figures = {"onnxruntime": onnxruntime.__version__, "wrong": []}
    for provider in PROVIDERS:
        figures[provider] = {}
        for precision, path in files.items():
            session = benchmark.start_session(path, provider)
            if isinstance(session, str):
                figures[provider] = session
                break
            logits = torch.from_numpy(benchmark.onnx_runner(session)(images.numpy()))
            same = (logits.argmax(1) == expected.argmax(1)).double().mean().item()
            # TensorRT builds an engine for each size, which takes long.
            sizes = SIZES[1:] if provider == PROVIDERS[0] else SIZES
            figures[provider][precision] = {
                "largest_difference_of_a_logit": float((logits - expected).abs().max()),
                "same_class_as_torch": same,
                **{f"batch_{n}": _rates(setting, session, images[:n].numpy()) for n in sizes},
            }
            if same < AGREEMENT[precision]:
                figures["wrong"].append(
                    f"{provider}, {precision}: torch's class for {same:.0%} of the images"
                )
    # A build for the CPU alone is nobody's mistake.
    on_cuda = figures["CUDAExecutionProvider"]
    if setting.device.type == "cuda" and str(on_cuda).startswith("does not start"):
        figures["wrong"].append(f"CUDAExecutionProvider {on_cuda}")
    return figures


def _rates(setting: Setting, session: Any, batch: Any) -> Figures:
    """Images a second from the host's memory and back, and with input and output bound to it."""
    import onnxruntime

    on = "cpu" if session.get_providers()[0] == PROVIDERS[-1] else "cuda"
    number = setting.device.index or 0
    binding = session.io_binding()
    binding.bind_ortvalue_input(
        "image", onnxruntime.OrtValue.ortvalue_from_numpy(batch, on, number)
    )
    binding.bind_output("logits", on, number)

    def bound() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    plain = setting.median(lambda: session.run(["logits"], {"image": batch}), 20)
    return {
        "images_per_second": len(batch) / plain,
        "images_per_second_bound": len(batch) / setting.median(bound, 20),
    }
