"""``phi1 doctor``: every probe answers for itself, whatever the machine is like."""

from __future__ import annotations

import io
import json
import shutil
import socket
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from phi1_megatron.commands import doctor as command
from phi1_megatron.doctor import (
    PROBES,
    Finding,
    Kernel,
    Machine,
    Probe,
    Report,
    Status,
    examine,
    live_kernels,
    probes,
)
from phi1_megatron.doctor.machine import import_apart, outside_range


def torch_of(*, gpus: int = 0, nccl: bool = False, gloo: bool = True, **distributed: Any) -> Any:
    """As much of torch as the probes ask."""
    gpu = types.SimpleNamespace(name="A100", total_memory=80 * 1024**3, major=8, minor=0)
    return types.SimpleNamespace(
        __version__="2.11.0",
        version=types.SimpleNamespace(cuda="12.8" if gpus else None, hip=None),
        ones=lambda size: [1.0] * size,
        cuda=types.SimpleNamespace(
            is_available=lambda: gpus > 0,
            device_count=lambda: gpus,
            get_device_properties=lambda index: gpu,
            nccl=types.SimpleNamespace(version=lambda: (2, 27, 3)),
        ),
        distributed=types.SimpleNamespace(
            is_available=lambda: True,
            is_gloo_available=lambda: gloo,
            is_nccl_available=lambda: nccl,
            is_mpi_available=lambda: False,
            HashStore=object,
            ProcessGroupGloo=distributed.get("group", lambda *_: GlooGroup()),
        ),
    )


class GlooGroup:
    def allreduce(self, tensors: list[Any]) -> Any:
        return types.SimpleNamespace(wait=lambda: None)


def machine_with(modules: Mapping[str, Any], **changes: Any) -> Machine:
    """A machine on which just these modules can be imported."""

    def import_here(name: str) -> Any:
        if name not in modules:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if isinstance(modules[name], BaseException):
            raise modules[name]
        return modules[name]

    return replace(Machine(), import_here=import_here, **changes)


def probe_named(name: str) -> Probe:
    return next(probe for probe in PROBES if probe.name == name)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts modules of our making before all others, for this process and for its children."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path.joinpath(*name.split("__"))
            path = path / "__init__.py" if name.islower() else path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_this_machine_can_train() -> None:
    report = examine()
    assert report.blockers == ()
    found = {finding.name: finding for finding in report.findings}
    assert found["megatron-core"].status is Status.OK
    assert found["dataset helpers"].status is Status.OK
    assert json.loads(json.dumps(report.as_dict()))["can_train"] is True


def test_pypi_s_apex_is_noticed_and_explained(install: Callable[..., None]) -> None:
    install(apex="raise RuntimeError('pyramid is not configured')", apex__lib="")
    finding = probe_named("apex").ask(Machine())
    assert finding.status is Status.BROKEN
    assert "not NVIDIA's" in finding.found
    assert "pip uninstall apex" in finding.means
    assert not finding.blocks_training


def test_nvidia_s_apex_without_its_extensions_says_so(install: Callable[..., None]) -> None:
    install(apex="", apex__optimizers="")
    finding = probe_named("apex").ask(Machine())
    assert finding.status is Status.BROKEN
    assert "No module named 'amp_C'" in finding.found


@pytest.mark.parametrize(("gpus", "status"), [(0, Status.FALLBACK), (1, Status.OK)])
def test_nvidia_s_apex_is_live_where_a_gpu_is(
    install: Callable[..., None], gpus: int, status: Status
) -> None:
    install(apex="", apex__optimizers="", amp_c="")
    machine = machine_with({"torch": torch_of(gpus=gpus)}, import_apart=lambda module: None)
    finding = probe_named("apex").ask(machine)
    assert (finding.status, finding.details["nvidia"]) == (status, True)


def test_a_transformer_engine_that_raises_is_broken_with_its_reason(
    install: Callable[..., None],
) -> None:
    reason = "libcudart.so.13: cannot open shared object file"
    install(transformer_engine="", transformer_engine__pytorch=f"raise OSError({reason!r})")
    finding = probe_named("TransformerEngine").ask(Machine())
    assert finding.status is Status.BROKEN
    assert f"OSError: {reason}" in finding.found
    assert "transformer_impl=local" in finding.means


def test_an_extension_that_kills_its_process_does_not_kill_the_doctor(
    install: Callable[..., None],
) -> None:
    install(flash_attn="import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    finding = probe_named("flash attention").ask(Machine())
    assert finding.status is Status.BROKEN
    assert "killed by SIGSEGV" in finding.found


def test_an_import_in_a_process_of_its_own_succeeds_or_gives_the_reason() -> None:
    assert import_apart("json") is None
    assert "no_such_module" in (import_apart("no_such_module") or "")


def test_without_torch_nothing_trains_and_every_probe_still_answers() -> None:
    report = examine(machine_with({}))
    assert len(report.findings) == len(PROBES)
    blocked = {finding.name for finding in report.blockers}
    assert {"torch", "megatron-core", "collectives"} <= blocked
    assert "no module torch" in report.findings[1].found


def test_a_torch_that_cannot_load_is_broken_not_missing() -> None:
    error = OSError("libtorch_cuda.so: undefined symbol")
    finding = probe_named("torch").ask(machine_with({"torch": error}))
    assert (finding.status, finding.blocks_training) == (Status.BROKEN, True)
    assert "undefined symbol" in finding.found


@pytest.mark.parametrize("raised", [ValueError("odd"), SystemExit(3), RuntimeError()])
def test_a_probe_that_raises_leaves_the_others_alone(raised: BaseException) -> None:
    def raises(machine: Machine) -> Finding:
        raise raised

    fine = Probe("fine", lambda machine: Finding(Status.OK, "here"))
    report = examine(Machine(), [Probe("odd", raises), fine])
    assert [finding.status for finding in report.findings] == [Status.BROKEN, Status.OK]
    assert report.can_train


def test_what_an_import_prints_stays_out_of_standard_output(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def chatty(machine: Machine) -> Finding:
        print("hello from a library")
        return Finding(Status.OK, "")

    examine(Machine(), [Probe("chatty", chatty)])
    assert capsys.readouterr().out == ""


def test_gpus_are_named_with_memory_and_capability() -> None:
    finding = probes.device(machine_with({"torch": torch_of(gpus=2)}))
    assert finding.found.splitlines()[1] == "cuda:1 A100, 80.0 GiB, capability 8.0"
    assert len(finding.details["devices"]) == 2


def test_a_driver_that_torch_does_not_see_is_pointed_out(tmp_path: Path) -> None:
    driver = tmp_path / "version"
    driver.touch()
    finding = probes.device(machine_with({"torch": torch_of()}, nvidia_driver=driver))
    assert finding.status is Status.FALLBACK
    assert "sees no GPU" in finding.means


def test_without_gloo_training_cannot_run() -> None:
    finding = probe_named("collectives").ask(machine_with({"torch": torch_of(gloo=False)}))
    assert (finding.status, finding.blocks_training) == (Status.BROKEN, True)


def test_a_gloo_that_cannot_resolve_this_host_is_broken_with_a_way_out() -> None:
    def unresolved(*_: object) -> None:
        raise RuntimeError(f"Unable to resolve hostname {socket.gethostname()}")

    machine = machine_with({"torch": torch_of(group=unresolved)})
    finding = probe_named("collectives").ask(machine)
    assert (finding.status, finding.blocks_training) == (Status.BROKEN, True)
    assert "GLOO_SOCKET_IFNAME" in finding.means


def test_nccl_is_live_where_gpus_are() -> None:
    finding = probes.collectives(machine_with({"torch": torch_of(gpus=1, nccl=True)}))
    assert (finding.status, finding.found) == (Status.OK, "NCCL 2.27.3; gloo for the CPU")


def test_a_shared_memory_that_is_not_there_blocks_training(tmp_path: Path) -> None:
    finding = probe_named("shared memory").ask(Machine(shared_memory=tmp_path / "shm"))
    assert (finding.status, finding.blocks_training) == (Status.BROKEN, True)


@pytest.mark.parametrize(
    ("free", "status"),
    [(4 * 1024**2, Status.BROKEN), (64 * 1024**2, Status.FALLBACK), (8 * 1024**3, Status.OK)],
)
def test_a_small_shared_memory_is_told_by_its_size(
    free: int, status: Status, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = types.SimpleNamespace(total=free, used=0, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert probes.shared_memory(Machine(shared_memory=tmp_path)).status is status


def test_slurm_names_the_job_it_is_inside() -> None:
    machine = Machine(
        environ={"SLURM_JOB_ID": "42"},
        which=lambda name: f"/usr/bin/{name}",
        first_line=lambda line: "slurm 24.05.3",
    )
    finding = probes.slurm(machine)
    assert (finding.status, finding.found) == (Status.OK, "slurm 24.05.3; inside job 42")


def test_an_mpi_launcher_without_mpi4py_is_missing_half() -> None:
    machine = Machine(which=lambda name: "/usr/bin/mpirun", first_line=lambda line: "Open MPI 5.0")
    finding = probes.mpi(machine)
    if finding.status is not Status.MISSING:
        pytest.skip("mpi4py is installed here")
    assert finding.found == "no mpi4py; Open MPI 5.0"


def test_a_version_outside_the_declared_range_is_told() -> None:
    if not outside_range("torch", "2.5.0"):
        pytest.skip("phi1-megatron is not installed, so its metadata declares no range")
    assert "2.14.0 is outside" in outside_range("torch", "2.14.0")
    assert outside_range("torch", "2.13.0+cpu") == ""


def finding_of(name: str, status: Status) -> Finding:
    return Finding(status, "", name=name)


@pytest.mark.parametrize(
    ("engine", "apex", "gpu", "attention", "adam"),
    [
        (Status.OK, Status.MISSING, True, "TransformerEngine", "TransformerEngine's FusedAdam"),
        (Status.MISSING, Status.OK, True, "PyTorch's scaled-dot-product", "apex's FusedAdam"),
        (Status.BROKEN, Status.MISSING, True, "PyTorch's scaled-dot-product", "PyTorch"),
        (Status.FALLBACK, Status.FALLBACK, False, "PyTorch's scaled-dot-product", "PyTorch"),
    ],
)
def test_the_kernels_follow_from_what_was_found(
    engine: Status, apex: Status, gpu: bool, attention: str, adam: str
) -> None:
    findings = [finding_of("TransformerEngine", engine), finding_of("apex", apex)]
    live = {kernel.work: kernel.live for kernel in live_kernels(findings, gpu)}
    assert (live["attention"], live["Adam"]) == (attention, adam)


REPORT = Report(
    findings=(
        Finding(Status.OK, "3.11.7 (/some/where/[brackets]/python)", name="Python"),
        Finding(Status.MISSING, "there is no module torch", "pip install -e .", {}, "torch", True),
        Finding(Status.FALLBACK, "gloo", "it carries all traffic " * 6, name="collectives"),
    ),
    kernels=(Kernel("attention", "PyTorch's scaled-dot-product", "no GPU"),),
)


def test_the_table_fits_80_columns_and_leaves_nothing_out() -> None:
    out = io.StringIO()
    command.show(REPORT, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for words in ("/some/where/[brackets]/python", "Training cannot run here", "scaled-dot"):
        assert words in text
    assert "…" not in text


@pytest.mark.parametrize("can_train", [True, False])
def test_the_command_exits_with_1_where_training_cannot_run(
    can_train: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = replace(REPORT, findings=REPORT.findings[:1]) if can_train else REPORT
    monkeypatch.setattr(command, "examine", lambda: report)
    if can_train:
        command.doctor(json=True)
    else:
        with pytest.raises(SystemExit) as exit_info:
            command.doctor(json=True)
        assert exit_info.value.code == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["can_train"] is can_train
    assert answer["blocked_by"] == ([] if can_train else ["torch"])
