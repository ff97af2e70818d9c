"""The corpus: drawn pictures of aircraft variants that are no task classes."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bob.formats.files import replacing_file
from bob.formats.prompts import Context, prompt
from bob.miniature import world
from bob.miniature.recipes import Scale
from bob.miniature.world import (
    BACKGROUNDS,
    CONTEXTS,
    CORPUS_SEED,
    DESCRIPTOR,
    POSES,
    Variant,
    corpus_variants,
)


@dataclass(frozen=True)
class Pictures:
    """Drawn pictures and the truth about each."""

    pixels: np.ndarray  # uint8 (n, 64, 64, 3)
    variant: np.ndarray  # int64 (n,), index into `variants`
    background: np.ndarray  # int64 (n,), index into BACKGROUNDS
    pose: np.ndarray  # int64 (n,), index into POSES
    variants: tuple[Variant, ...]

    @classmethod
    def drawn(
        cls,
        variants: tuple[Variant, ...],
        wanted: Sequence[tuple[int, str, str, int]],
        seed: int = CORPUS_SEED,
    ) -> Pictures:
        """Draw pictures from (variant's index, background, pose, index) of each."""
        pixels = [
            np.asarray(world.draw(variants[v], background, pose, index, seed))
            for v, background, pose, index in tqdm(wanted, desc="drawing", disable=None)
        ]
        truth = [(v, BACKGROUNDS.index(b), POSES.index(p)) for v, b, p, _ in wanted]
        columns = np.array(truth, np.int64).T
        return cls(np.stack(pixels), columns[0], columns[1], columns[2], variants)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def context(self) -> np.ndarray:
        """Background and pose as one number, int64 (n,), index into CONTEXTS."""
        return self.background * len(POSES) + self.pose

    def tensor(self, rows: Any) -> Tensor:
        """Pictures as the networks take them: float32 (n, 3, 64, 64) in [-1, 1]."""
        return as_input(self.pixels[rows])

    def caption(self, row: int) -> str:
        """The paper's template, filled with the truth."""
        context = Context(BACKGROUNDS[self.background[row]], POSES[self.pose[row]])
        return prompt(DESCRIPTOR, self.variants[self.variant[row]].name, context)

    def rows(self, count: int, generator: torch.Generator) -> np.ndarray:
        """`count` rows at random, with repetition."""
        return torch.randint(len(self), (count,), generator=generator).numpy()


def as_input(pixels: np.ndarray) -> Tensor:
    """uint8 (n, 64, 64, 3) as the networks take it: float32 (n, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_pictures(
    variants: tuple[Variant, ...], indices: range, seed: int = CORPUS_SEED
) -> Pictures:
    """Every variant in every context, once for each index."""
    every = itertools.product(range(len(variants)), CONTEXTS, indices)
    return Pictures.drawn(variants, [(v, *context, index) for v, context, index in every], seed)


def load_corpus(scale: Scale, work: Path) -> Pictures:
    """The corpus, drawn once for each version of `bob/miniature/world.py`."""
    version = hashlib.sha256(inspect.getsource(world).encode()).hexdigest()[:12]
    path = work / f"corpus-{version}-{scale.pictures}.npz"
    variants = corpus_variants()[: scale.variants]
    if not path.exists():
        corpus = draw_pictures(variants, range(scale.pictures))
        arrays = {f.name: getattr(corpus, f.name) for f in fields(corpus) if f.name != "variants"}
        with replacing_file(path) as draft, draft.open("wb") as file:
            np.savez(file, **arrays)
    with np.load(path) as stored:
        return Pictures(**dict(stored), variants=variants)
