"""Imported once by the server that test ranks are forked from."""

from phi1_megatron.distributed.quiet import quiet_expected_warnings

quiet_expected_warnings()

import phi1_megatron.training.trainer  # noqa: E402, F401
