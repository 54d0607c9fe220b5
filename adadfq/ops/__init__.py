"""The ``torch.ops.adadfq`` operators: importing this package defines and registers them."""

from adadfq.ops import schema as schema
