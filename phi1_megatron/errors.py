"""The errors this package raises for its users.

::

    Phi1Error                  anything a user can mend; one sentence, no traceback
    ├── UsageError             what was asked for cannot be: exit code 2 (also a ValueError)
    │   ├── RecipeError        a recipe's key, type or value
    │   └── LayoutError        a parallel layout that does not divide
    ├── DataError              a data set, tokenizer or corpus that cannot be used
    ├── CheckpointError        a checkpoint that cannot be read, written or matched
    └── LaunchError            ranks that cannot be started, or one that failed

A message names the thing, its place and the arithmetic, and says what to do. Bugs of our own are
``assert`` and plain exceptions instead: they keep their traceback.
"""

from __future__ import annotations


class Phi1Error(Exception):
    """Base of every error a user can mend. ``exit_code`` is what the command line exits with."""

    exit_code = 1


class UsageError(Phi1Error, ValueError):
    """What was asked for cannot be done as asked."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, or an override of it, holds an unknown key, a wrong type or an impossible value."""


class LayoutError(UsageError):
    """The parallel layout does not divide the model, the batch or the number of ranks."""


class DataError(Phi1Error):
    """A data set, tokenizer or corpus is missing, truncated or does not fit the model."""


class CheckpointError(Phi1Error):
    """A checkpoint is missing, torn, or belongs to another model."""


class LaunchError(Phi1Error):
    """The ranks of a run could not be started, or one of them failed."""
