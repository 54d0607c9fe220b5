"""Built-in networks, and building any network from a written specification."""

from adadfq.models.build import BUILTINS, build_model, is_trusted, model_spec, rebuild_model
from adadfq.models.resnet_cifar import CifarResNet, resnet20, resnet32, resnet44, resnet56

__all__ = [
    "BUILTINS",
    "CifarResNet",
    "build_model",
    "is_trusted",
    "model_spec",
    "rebuild_model",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
]
