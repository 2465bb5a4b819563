"""Asks all the questions, keeps them apart, and draws the conclusions."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from phi1_megatron.doctor import probes as look_at
from phi1_megatron.doctor.machine import Machine
from phi1_megatron.doctor.report import Finding, Kernel, Report, Status


@dataclass(frozen=True)
class Probe:
    """A question to the machine; a required one blocks training where nothing works."""

    name: str
    look: Callable[[Machine], Finding]
    required: bool = False

    def ask(self, machine: Machine) -> Finding:
        """Ask, and turn whatever is raised into a finding."""
        try:
            finding = self.look(machine)
        except ModuleNotFoundError as error:
            missing = f"there is no module {error.name}"
            finding = Finding(Status.MISSING, missing, "run make quickstart, or pip install -e .")
        except (Exception, SystemExit) as error:  # noqa: BLE001  any library may raise anything
            finding = Finding(
                Status.BROKEN, look_at.one_line(error), "reinstall it; it cannot be used so"
            )
        blocks = self.required and finding.status in (Status.MISSING, Status.BROKEN)
        return replace(finding, name=self.name, blocks_training=blocks)


PROBES = (
    Probe("Python", look_at.python, required=True),
    Probe("torch", look_at.torch_build, required=True),
    Probe("device", look_at.device, required=True),
    Probe("megatron-core", look_at.megatron_core, required=True),
    Probe("dataset helpers", look_at.dataset_helpers, required=True),
    Probe("checkpoint writer", look_at.checkpoint_writer, required=True),
    Probe("TransformerEngine", look_at.transformer_engine),
    Probe("apex", look_at.apex),
    Probe("flash attention", look_at.flash_attention),
    Probe("collectives", look_at.collectives, required=True),
    Probe("MPI", look_at.mpi),
    Probe("Slurm", look_at.slurm),
    Probe("shared memory", look_at.shared_memory, required=True),
    Probe("disk", look_at.disk),
    Probe("open files", look_at.open_files),
    Probe("Hugging Face", look_at.libraries("transformers", "tokenizers", "safetensors")),
    Probe("text", look_at.libraries("sentencepiece", "nltk")),
)


def live_kernels(findings: Sequence[Finding], gpu: bool) -> tuple[Kernel, ...]:
    """Say who does the work of a training step here, from what the probes found."""
    status = {finding.name: finding.status for finding in findings}

    def live(name: str) -> bool:
        return gpu and status.get(name) is Status.OK

    def why_not(name: str) -> str:
        if not gpu:
            return f"{name} needs a GPU"
        return f"{name} is {'not installed' if status.get(name) is Status.MISSING else 'broken'}"

    engine = "TransformerEngine"
    if live(engine):
        with_flash = " with flash-attn" if live("flash attention") else ""
        return (
            Kernel("linear, LayerNorm", engine),
            Kernel("attention", f"{engine}{with_flash}"),
            Kernel("Adam", f"{engine}'s FusedAdam"),
            Kernel("gradient norm", f"{engine}'s multi-tensor kernels"),
        )
    why = why_not(engine)
    modules = (
        Kernel("linear, LayerNorm", "megatron-core, PyTorch", why),
        Kernel("attention", "PyTorch's scaled-dot-product", why),
    )
    if live("apex"):
        return (
            *modules,
            Kernel("Adam", "apex's FusedAdam", why),
            Kernel("gradient norm", "apex's multi-tensor kernels", why),
        )
    neither = f"{engine} and apex need a GPU" if not gpu else f"{why}, {why_not('apex')}"
    return (
        *modules,
        Kernel("Adam", "PyTorch", neither),
        Kernel("gradient norm", "PyTorch", neither),
    )


def examine(machine: Machine | None = None, probes: Sequence[Probe] = PROBES) -> Report:
    """Ask every probe about this machine (or the one given) and draw the conclusions."""
    machine = machine or Machine()
    # What libraries print while they are imported would spoil `phi1 doctor --json > file`.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        findings = tuple(probe.ask(machine) for probe in probes)
        gpu = machine.has_gpu()
    return Report(findings, live_kernels(findings, gpu))
