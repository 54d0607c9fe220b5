"""Differentiable functions: quantisation, BatchNorm and its matching, and the two players' losses on logits.

Each checks its arguments, runs one operator of ``torch.ops.adadfq`` and attaches the gradient (codes have none). All
take float32, bfloat16, float16 and float64 tensors of any layout; arithmetic is in float32 (float64 for float64). None
of them waits for the device, and all can be compiled with ``fullgraph=True`` (there no tensor may be given twice in one
call).
Gradients are first order only; ``create_graph=True`` is refused where a second derivative would be wrong.
"""

from adadfq.functional.affine import affine_act_fake_quantize, affine_act_quantize
from adadfq.functional.batch_norm import BatchNormAct, batch_norm_act, bn_match, bn_match_forward
from adadfq.functional.logit_losses import MarginLoss, entropy_distillation, margin_loss
from adadfq.functional.packing import quantize_pack, unpack_dequantize
from adadfq.functional.quantizers import (
    dynamic_fake_quantize,
    fake_quantize,
    foreach_dynamic_fake_quantize,
    foreach_fake_quantize,
    observe_fake_quantize,
    qparams,
)

__all__ = [
    "BatchNormAct",
    "MarginLoss",
    "affine_act_fake_quantize",
    "affine_act_quantize",
    "batch_norm_act",
    "bn_match",
    "bn_match_forward",
    "dynamic_fake_quantize",
    "entropy_distillation",
    "fake_quantize",
    "foreach_dynamic_fake_quantize",
    "foreach_fake_quantize",
    "margin_loss",
    "observe_fake_quantize",
    "qparams",
    "quantize_pack",
    "unpack_dequantize",
]
