"""Data-free quantisation of vision networks to 2-8 bits by an adaptive generator (AdaDFQ, CVPR 2023)."""

from adadfq import functional as functional
from adadfq.errors import AdadfqError as AdadfqError
from adadfq.errors import BackendError as BackendError
from adadfq.errors import CheckpointError as CheckpointError
from adadfq.errors import InvalidInputError as InvalidInputError
from adadfq.models.build import build_model as build_model
from adadfq.nn import QuantAct as QuantAct
from adadfq.nn import QuantConv2d as QuantConv2d
from adadfq.nn import QuantLinear as QuantLinear
from adadfq.ops.dispatch import use_backend as use_backend
from adadfq.quantize import quantize as quantize
from adadfq.quantize import report as report
from adadfq.recipe import Recipe as Recipe
from adadfq.result import Result as Result
from adadfq.result import load as load
from adadfq.trainer import Trainer as Trainer
from adadfq.version import __version__ as __version__
