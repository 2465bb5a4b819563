"""The ``phi1`` command: a table of verbs.

Each verb's module is imported when the verb is called, and imports torch only when it works, so
``phi1 --help`` answers at once. Exit codes: 0 done, 1 failed, 2 asked for wrongly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from cyclopts import App, CycloptsError

from phi1_megatron import __version__
from phi1_megatron.distributed.quiet import quiet_expected_warnings
from phi1_megatron.errors import Phi1Error

_VERBS = {
    "quickstart": "The whole path on this machine: corpus, tokenizer, training, export, text.",
    "train": "Train from a recipe, or go on where its run folder stands.",
    "preprocess": "Turn documents (JSONL, parquet) into an indexed data set.",
    "export": "Write a checkpoint as a Hugging Face folder.",
    "convert": "Convert a checkpoint; --to huggingface is what export does.",
    "generate": "Complete prompts with a trained model.",
    "doctor": "Say what this machine gives, and what falls back to what.",
}
_GROUPS = {
    "data": (
        "Inspect, verify and merge indexed data sets.",
        {
            "inspect": "What a data set holds.",
            "verify": "Check a data set's structure, bounds and checksums.",
            "merge": "Join data sets into one.",
            "prepare": "Build the sample indices of a recipe's data.",
        },
    ),
    "benchmark": (
        "Measure this package beside others, on this machine.",
        {
            "preprocess": "Preprocessing: speed, memory and bytes, side by side.",
            "read": "Reading samples, beside megatron-core's GPTDataset.",
        },
    ),
    "tokenizer": (
        "Train tokenizers.",
        {"train": "Train a BPE or a SentencePiece model on documents."},
    ),
}


def build_app() -> App:
    """The command with all its verbs; none of their modules is imported yet."""
    app = App(
        name="phi1",
        help="Train phi-1, and models like it, with 3D parallelism: on a laptop or on GPUs.",
        version=__version__,
        suppress_keyboard_interrupt=False,
        help_epilogue="Every verb takes --debug for a traceback. Recipes: examples/recipes/.",
    )
    for verb, summary in _VERBS.items():
        app.command(f"phi1_megatron.commands.{verb}:{verb}", name=verb, help=summary)
    for group, (summary, verbs) in _GROUPS.items():
        sub = App(name=group, help=summary)
        for verb, verb_summary in verbs.items():
            sub.command(f"phi1_megatron.commands.{group}:{verb}", name=verb, help=verb_summary)
        app.command(sub)
    return app


def main() -> NoReturn:
    """Run ``phi1`` on this process's arguments."""
    run_app(build_app(), sys.argv[1:])


def run_single(import_path: str, prog: str) -> NoReturn:
    """Run one verb as a script of its own, as ``tools/preprocess/preprocess_data.py`` does.

    Args:
        import_path: ``module:function`` of the verb.
        prog: what the script is called in its help.
    """
    app = App(name=prog)
    app.default(_import(import_path))
    run_app(app, sys.argv[1:])


def _import(import_path: str) -> Callable[..., Any]:
    import importlib

    module, _, function = import_path.partition(":")
    verb: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return verb


def run_app(app: App, arguments: Sequence[str]) -> NoReturn:
    """Run a command line and end this process: one sentence for an error, unless ``--debug``."""
    quiet_expected_warnings()
    debug = "--debug" in arguments
    words = [word for word in arguments if word != "--debug"]
    try:
        app(words, exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except Phi1Error as error:
        if debug:
            raise
        print(f"phi1: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("phi1: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
