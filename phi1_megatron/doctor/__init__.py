"""``phi1 doctor``: what this machine gives to training, what is live, what falls back to what.

``examine`` asks each probe in turn and keeps them apart: an import that raises, or even kills its
process, is a finding with its reason, and the other probes still answer. Nothing heavy is imported
before ``examine`` is called.
"""

from phi1_megatron.doctor.examination import PROBES, Probe, examine, live_kernels
from phi1_megatron.doctor.machine import Machine
from phi1_megatron.doctor.report import Finding, Kernel, Report, Status

__all__ = [
    "PROBES",
    "Finding",
    "Kernel",
    "Machine",
    "Probe",
    "Report",
    "Status",
    "examine",
    "live_kernels",
]
