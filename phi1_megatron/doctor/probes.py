"""The questions: one function each, that looks at one part of the machine.

A probe may raise whatever its library raises; ``Probe.ask`` makes a finding of it.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from phi1_megatron.doctor.machine import Machine, outside_range, version_of
from phi1_megatron.doctor.report import Finding, Status

GIB = 1024**3
SMALL_SHARED_MEMORY = GIB  # below it, data loader workers and NCCL may run out
UNUSABLE_SHARED_MEMORY = 8 * 1024**2
PHI1_CHECKPOINT = 20 * GIB  # 1.42e9 parameters x (2 bf16 + 12: fp32 weight and Adam's two moments)
SMALL_NOFILE = 4096


def python(machine: Machine) -> Finding:
    """Look at the interpreter."""
    found = f"{platform.python_version()} ({sys.executable})"
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Finding(Status.BROKEN, found, "Python 3.11, 3.12 or 3.13 is needed")
    return Finding(Status.OK, found, details={"platform": platform.platform()})


def torch_build(machine: Machine) -> Finding:
    """Look at torch's version and what it was built for."""
    torch = machine.import_here("torch")
    cuda, hip = torch.version.cuda, getattr(torch.version, "hip", None)
    build = f"CUDA {cuda}" if cuda else f"ROCm {hip}" if hip else "CPU"
    details = {"version": str(torch.__version__), "build": build}
    found = f"{torch.__version__}, built for {build}"
    outside = outside_range("torch", str(torch.__version__))
    return Finding(Status.FALLBACK if outside else Status.OK, found, outside, details)


def device(machine: Machine) -> Finding:
    """Look at the device that training would run on."""
    torch = machine.import_here("torch")
    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        devices = [
            {
                "name": gpu.name,
                "memory_gib": round(gpu.total_memory / GIB, 1),
                "capability": f"{gpu.major}.{gpu.minor}",
            }
            for gpu in every
        ]
        lines = [
            f"cuda:{i} {d['name']}, {d['memory_gib']} GiB, capability {d['capability']}"
            for i, d in enumerate(devices)
        ]
        old = [gpu.name for gpu in every if gpu.major < 8]
        means = f"bf16 needs capability 8.0: use fp16 on {old[0]}" if old else ""
        return Finding(Status.OK, "\n".join(lines), means, {"type": "cuda", "devices": devices})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    found = f"CPU, {cores} cores, {memory:.1f} GiB of memory"
    means = "no CUDA device: the CPU stands in for it, for small models"
    if machine.nvidia_driver.exists():
        means = (
            f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU: "
            "check nvidia-smi, CUDA_VISIBLE_DEVICES, and that torch is a CUDA build for this driver"
        )
    details = {"type": "cpu", "cores": cores, "memory_gib": round(memory, 1)}
    return Finding(Status.FALLBACK, found, means, details)


def megatron_core(machine: Machine) -> Finding:
    """Look at megatron-core; importing it imports TransformerEngine and apex where they are."""
    version = str(machine.import_here("megatron.core").__version__)
    outside = outside_range("megatron-core", version)
    status = Status.FALLBACK if outside else Status.OK
    return Finding(status, version, outside, {"version": version})


def dataset_helpers(machine: Machine) -> Finding:
    """Look at megatron-core's compiled helpers, which build the sample index of a dataset."""
    module = machine.import_here("megatron.core.datasets.helpers_cpp")
    return Finding(Status.OK, "compiled", details={"file": str(module.__file__)})


def checkpoint_writer(machine: Machine) -> Finding:
    """Look for psutil: megatron-core's checkpoint writer imports it and does not declare it."""
    module = machine.import_here("psutil")
    return Finding(Status.OK, f"psutil {module.__version__}")


def transformer_engine(machine: Machine) -> Finding:
    """Look at NVIDIA's TransformerEngine, and for the GPU that it needs."""
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding(Status.MISSING, "not installed", "PyTorch's and megatron-core's own modules")
    version = version_of("transformer-engine") or "of unknown version"
    reason = machine.import_apart("transformer_engine.pytorch")
    if reason:
        means = "reinstall it for this torch and CUDA, or set training.transformer_impl=local"
        return Finding(Status.BROKEN, f"{version}: {reason}", means)
    if not machine.has_gpu():
        return Finding(Status.FALLBACK, version, "it needs a GPU: PyTorch's own modules")
    return Finding(Status.OK, version, details={"version": version})


def apex(machine: Machine) -> Finding:
    """Look for NVIDIA's apex, and for the PyPI package that has its name and nothing else of it."""
    spec = importlib.util.find_spec("apex")  # a top-level name is found without being imported
    if spec is None:
        return Finding(
            Status.MISSING, "not installed", "TransformerEngine's or PyTorch's optimizer"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    version = version_of("apex") or "of unknown version"
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return Finding(
            Status.BROKEN,
            f"the installed apex {version} is not NVIDIA's",
            "PyPI's apex is an unrelated web toolkit: pip uninstall apex; "
            "NVIDIA's is built from github.com/NVIDIA/apex and is not needed here",
            {"folders": [str(folder) for folder in folders], "nvidia": False},
        )
    reason = machine.import_apart("amp_C, apex.optimizers")
    if reason:
        means = "NVIDIA's, without working CUDA extensions: PyTorch's optimizer"
        return Finding(Status.BROKEN, f"{version}: {reason}", means, {"nvidia": True})
    if not machine.has_gpu():
        means = "it needs a GPU: PyTorch's optimizer"
        return Finding(Status.FALLBACK, version, means, {"nvidia": True})
    return Finding(Status.OK, f"{version}, NVIDIA's", details={"nvidia": True})


def flash_attention(machine: Machine) -> Finding:
    """Look at the flash-attn package, which TransformerEngine's attention can use."""
    if importlib.util.find_spec("flash_attn") is None:
        means = (
            "PyTorch's scaled_dot_product_attention, which has FlashAttention kernels of its own"
        )
        return Finding(Status.MISSING, "flash-attn is not installed", means)
    version = version_of("flash-attn") or "of unknown version"
    reason = machine.import_apart("flash_attn")
    if reason:
        return Finding(
            Status.BROKEN, f"flash-attn {version}: {reason}", "reinstall it or remove it"
        )
    if not machine.has_gpu():
        return Finding(
            Status.FALLBACK, f"flash-attn {version}", "it needs a GPU: PyTorch's attention"
        )
    return Finding(Status.OK, f"flash-attn {version}", "used through TransformerEngine")


def collectives(machine: Machine) -> Finding:
    """Look at NCCL, and really reduce a tensor over gloo: this host's name must resolve."""
    torch = machine.import_here("torch")
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        means = "ranks cannot talk to each other: install a torch built with distributed and gloo"
        return Finding(Status.BROKEN, "torch has no gloo", means)
    try:
        group = distributed.ProcessGroupGloo(distributed.HashStore(), 0, 1, timedelta(seconds=20))
        group.allreduce([torch.ones(1)]).wait()
    except (RuntimeError, ValueError) as error:
        means = "check that this host's name resolves, or name an interface: GLOO_SOCKET_IFNAME=lo"
        return Finding(Status.BROKEN, f"gloo: {one_line(error)}", means)
    gpu, nccl = machine.has_gpu(), distributed.is_nccl_available()
    details = {"gloo": True, "nccl": nccl, "mpi": distributed.is_mpi_available()}
    if gpu and nccl:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return Finding(Status.OK, f"NCCL {version}; gloo for the CPU", details=details)
    if gpu:
        means = "GPU ranks need NCCL: install a torch built with it, or train with one rank"
        return Finding(Status.FALLBACK, "gloo; torch has no NCCL", means, details)
    return Finding(Status.FALLBACK, "gloo", "NCCL needs GPUs: gloo carries all traffic", details)


def mpi(machine: Machine) -> Finding:
    """Look at mpi4py and the launcher, for ``mpirun phi1 train`` and preprocessing over MPI."""
    launcher = machine.which("mpirun") or machine.which("mpiexec")
    vendor = machine.first_line([launcher, "--version"]) if launcher else "no mpirun"
    if importlib.util.find_spec("mpi4py") is None:
        means = "torchrun, Slurm or phi1's own launcher; preprocessing in local processes"
        return Finding(Status.MISSING, f"no mpi4py; {vendor}", means)
    version = version_of("mpi4py") or "of unknown version"
    reason = machine.import_apart("mpi4py.MPI")
    if reason:
        means = "install the MPI library that mpi4py loads, or start without MPI"
        return Finding(Status.BROKEN, f"mpi4py {version}; {vendor}: {reason}", means)
    status = Status.OK if launcher else Status.FALLBACK
    return Finding(status, f"mpi4py {version}; {vendor}")


def slurm(machine: Machine) -> Finding:
    """Look at Slurm's commands, and whether this is a job already."""
    tools = {name: machine.which(name) for name in ("srun", "sbatch")}
    job = machine.environ.get("SLURM_JOB_ID")
    inside = f"inside job {job}" if job else "not inside a job"
    if not all(tools.values()):
        lacking = ", no ".join(name for name, place in tools.items() if not place)
        means = "phi1 starts local ranks, or takes its place from torchrun or MPI"
        status = Status.FALLBACK if job else Status.MISSING
        return Finding(status, f"no {lacking}; {inside}", means, {"job": job})
    version = machine.first_line([str(tools["srun"]), "--version"])
    return Finding(Status.OK, f"{version}; {inside}", details={"job": job})


def shared_memory(machine: Machine) -> Finding:
    """Look at /dev/shm, where workers and NCCL pass tensors: there, writable, large enough?"""
    place = machine.shared_memory
    if not place.is_dir():
        return Finding(Status.BROKEN, f"{place} is not there", "mount a tmpfs on it")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"phi1 doctor")
    except OSError as error:
        return Finding(Status.BROKEN, f"{place}: {one_line(error)}", "make it writable")
    usage = shutil.disk_usage(place)
    found = f"{gib(usage.free)} free of {gib(usage.total)} at {place}"
    details = {"total": usage.total, "free": usage.free}
    if usage.free < UNUSABLE_SHARED_MEMORY:
        return Finding(Status.BROKEN, found, "remove what is left over in it", details)
    if usage.free < SMALL_SHARED_MEMORY:
        means = "little: give the container --shm-size=8g, or set data.num_workers=0"
        return Finding(Status.FALLBACK, found, means, details)
    return Finding(Status.OK, found, details=details)


def disk(machine: Machine) -> Finding:
    """Look at the disk under the working directory, where run folders go."""
    place = machine.working_directory
    free = shutil.disk_usage(place).free
    found, details = f"{gib(free)} free at {place}", {"free": free}
    if not os.access(place, os.W_OK):
        return Finding(Status.FALLBACK, f"{found}, not writable", "name another --run-dir", details)
    whole = free // PHI1_CHECKPOINT
    means = f"{whole} whole checkpoints of phi-1 ({gib(PHI1_CHECKPOINT)} each, with Adam's state)"
    return Finding(Status.OK if whole else Status.FALLBACK, found, means, details)


def libraries(*distributions: str) -> Callable[[Machine], Finding]:
    """Make a probe that names the versions of packages, without importing them."""

    def look(machine: Machine) -> Finding:
        versions = {name: version_of(name) for name in distributions}
        found = ", ".join(f"{name} {version or '(missing)'}" for name, version in versions.items())
        lacking = [name for name, version in versions.items() if version is None]
        means = f"pip install {' '.join(lacking)}" if lacking else ""
        return Finding(Status.MISSING if lacking else Status.OK, found, means, versions)

    return look


def open_files(machine: Machine) -> Finding:
    """Look at the limit on open files: every rank, worker and checkpoint shard takes some."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    words = [("unlimited" if n == resource.RLIM_INFINITY else str(n)) for n in (soft, hard)]
    found = f"{words[0]} (hard limit {words[1]})"
    if soft != resource.RLIM_INFINITY and soft < SMALL_NOFILE:
        means = f"low for many ranks and workers: ulimit -n {SMALL_NOFILE}"
        return Finding(Status.FALLBACK, found, means, {"soft": soft, "hard": hard})
    return Finding(Status.OK, found, details={"soft": soft, "hard": hard})


def gib(size: int) -> str:
    """Write a number of bytes in GiB, or in MiB where it is small."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 1024**2:.0f} MiB"


def one_line(error: BaseException) -> str:
    """Write an error as its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
