"""What ao raises. Every message says what was asked, what was found, and what to do."""

from __future__ import annotations


class AoError(Exception):
    """Base of all errors that ao raises on purpose; the command line turns one into exit code 1."""


class UnknownNameError(AoError, LookupError):
    """A scheme, op, kernel or algorithm that no usable plugin registered."""


class OptionError(AoError, ValueError):
    """An option that a scheme does not have, or a value that it does not take."""


class RejectedError(AoError, ValueError):
    """A weight or a device that a scheme or kernel said no to; the message holds its reason."""


class PlanError(AoError, ValueError):
    """A rule or plan that does not fit the model."""


class PluginError(AoError):
    """A plugin that could not be loaded, under ``AO_STRICT_PLUGINS=1``."""


class CheckpointError(AoError):
    """A checkpoint that is missing, corrupt, truncated, or needs something that is not installed."""


class ModelError(AoError):
    """A model or text that could not be read."""


class PlanWarning(UserWarning):
    """A plan that is applied elsewhere than where its times were measured."""
