"""Warnings that say nothing to a user."""

from __future__ import annotations

import os
import warnings


def quiet_expected_warnings() -> None:
    """Leave out what megatron-core and torch say about megatron-core's own calls, which no user can
    mend; phi1 doctor tells in one table what is installed."""
    for category, message in (
        (UserWarning, ".*Apex (is|are) not installed.*"),
        (UserWarning, ".*Transformer Engine and Apex are not installed.*"),
        (UserWarning, ".*full scope is deprecated.*"),
        (UserWarning, ".*The .grad attribute of a Tensor that is not a leaf.*"),
        (FutureWarning, ".*torch.distributed.*is deprecated.*"),
    ):
        warnings.filterwarnings("ignore", message=message, category=category)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
