"""The exceptions adadfq raises on purpose. Each message says what was wrong, what was expected and what to do."""

from __future__ import annotations


class AdadfqError(Exception):
    """Base of every error adadfq raises on purpose; the command line prints it as one line."""


class InvalidInputError(AdadfqError, ValueError):
    """A value, shape, dtype or model was refused before anything was changed."""


class CheckpointError(AdadfqError, RuntimeError):
    """A file could not be read, is not what it should be, or does not fit the model."""


class BackendError(AdadfqError, RuntimeError):
    """A backend was asked for by name and cannot serve the call."""
