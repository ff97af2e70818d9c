"""How alike sets of images are, by their features in some network."""

from collections.abc import Sequence

import numpy as np
from sklearn.metrics.pairwise import polynomial_kernel

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000  # at most; Binkowski et al. 2018
NEAREST_BLOCK = 1024  # rows that are compared with all others at once


def diversity(features: np.ndarray, classes: Sequence[str]) -> float:
    """Mean cosine distance between two images of one class, averaged over classes: 0 to 2.

    `features` is (n, d). A class with a single image counts as 0.
    """
    features = _unit(features)
    names = np.asarray(classes)
    distances = []
    for name in sorted(set(classes)):
        members = features[names == name]
        n = len(members)
        # The mean over pairs of 1 - cos, from the norm of the sum instead of all pairs.
        squared_sum = float((members.sum(axis=0) ** 2).sum())
        distances.append(1 - (squared_sum - n) / (n * (n - 1)) if n > 1 else 0.0)
    return float(np.mean(distances))


def nearest(
    features: np.ndarray, among: np.ndarray, count: int, *, itself: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The `count` rows of `among` that are most alike to each row of `features`, best first.

    By cosine similarity; both are (n, d) and (m, d). Returns row numbers and similarities, both
    (n, k) with k at most `count`. With `itself` the two are the same set, and no row is its own.
    """
    among = _unit(among)
    count = min(count, len(among) - itself)
    numbers = np.empty((len(features), count), dtype=np.int64)
    values = np.empty((len(features), count))
    for start in range(0, len(features), NEAREST_BLOCK):
        rows = np.arange(start, min(start + NEAREST_BLOCK, len(features)))
        similarity = _unit(features[rows]) @ among.T
        if itself:
            similarity[np.arange(len(rows)), rows] = -np.inf
        best = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
        numbers[rows], values[rows] = best, np.take_along_axis(similarity, best, axis=1)
    return numbers, values


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def kernel_inception_distance(real: np.ndarray, generated: np.ndarray) -> tuple[float, float]:
    """KID, mean and standard deviation over random subsets (Binkowski et al. 2018, eq. 4).

    The squared MMD between features (n, d) and (m, d). Unlike FID it is unbiased at any number of
    images; few of them only make it noisier.
    """
    random = np.random.default_rng(0)
    size = subset_size(real, generated)
    if size < 2:
        return 0.0, 0.0
    values = [
        squared_mmd(
            real[random.choice(len(real), size, replace=False)],
            generated[random.choice(len(generated), size, replace=False)],
        )
        for _ in range(KID_SUBSETS)
    ]
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased squared MMD of features (n, d) and (n, d) with the kernel (x.y / d + 1)^3."""
    n = len(x)
    k_xx, k_yy, k_xy = (
        polynomial_kernel(a, b, degree=3, coef0=1) for a, b in ((x, x), (y, y), (x, y))
    )
    within = (k_xx.sum() - k_xx.trace() + k_yy.sum() - k_yy.trace()) / (n * (n - 1))
    return float(within - 2 * k_xy.mean())


def subset_size(real: np.ndarray, generated: np.ndarray) -> int:
    """Images in each of the random subsets that `kernel_inception_distance` draws."""
    # Half of the smaller set, so that the subsets differ and their spread says something.
    return min(KID_SUBSET_SIZE, len(real) // 2, len(generated) // 2)
