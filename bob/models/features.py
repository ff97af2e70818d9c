"""What a network sees in images: pooled features, as it gives them to its head."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bob.models.preprocessing import Preprocessing, read_inputs


@torch.inference_mode()
def pooled_features(
    network: nn.Module,
    preprocessing: Preprocessing,
    paths: Sequence[str | Path],
    device: torch.device,
) -> np.ndarray:
    """Features of images, (n, d) float64, by a network of `Backbone.features`, which is moved."""
    network = network.eval().to(device)
    if device.type == "cuda":  # the faster convolutions; on a CPU the features' last bits are kept
        network = network.to(memory_format=torch.channels_last)
    return torch.cat(
        [network(batch.to(device)).double().cpu() for batch in read_inputs(paths, preprocessing)]
    ).numpy()
