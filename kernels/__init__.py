"""Triton kernels, packaged as ``adadfq.kernels``; :mod:`adadfq.ops.triton` checks their arguments."""
