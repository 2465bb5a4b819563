"""What an examination of the machine hands back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from phi1_megatron import __version__


class Status(StrEnum):
    """How a part of the machine stands."""

    OK = "ok"
    FALLBACK = "fallback"
    MISSING = "missing"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """What one probe saw, and what follows from it."""

    status: Status
    found: str
    means: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    blocks_training: bool = False


@dataclass(frozen=True)
class Kernel:
    """Who does one kind of work in a training step here, and why it is not the faster one."""

    work: str
    live: str
    why: str = ""


@dataclass(frozen=True)
class Report:
    """All findings, and the kernels that follow from them."""

    findings: tuple[Finding, ...]
    kernels: tuple[Kernel, ...]
    version: str = __version__

    @property
    def blockers(self) -> tuple[Finding, ...]:
        """The findings that keep training from running at all."""
        return tuple(finding for finding in self.findings if finding.blocks_training)

    @property
    def can_train(self) -> bool:
        """Can a training run start on this machine?"""
        return not self.blockers

    def as_dict(self) -> dict[str, Any]:
        """Give the report in JSON's types, for ``phi1 doctor --json``."""
        return {
            "phi1_megatron": self.version,
            "can_train": self.can_train,
            "blocked_by": [finding.name for finding in self.blockers],
            "findings": [asdict(finding) for finding in self.findings],
            "kernels": [asdict(kernel) for kernel in self.kernels],
        }
