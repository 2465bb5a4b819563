"""The whole path on one machine: source code in, a trained phi-1 and its completions out.

Each stage leaves its result in the quickstart's folder, whole or not at all; a second run goes on
where the first one ended.
"""

from __future__ import annotations

import math
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from phi1_megatron.checkpoint.export import export_checkpoint
from phi1_megatron.checkpoint.hf_folder import MANIFEST
from phi1_megatron.commands.export import weights_progress
from phi1_megatron.commands.generate import show_completion
from phi1_megatron.commands.preprocess import run_with_progress
from phi1_megatron.commands.progress import progress_bar
from phi1_megatron.config.load import load_recipe
from phi1_megatron.config.schema import RunConfig
from phi1_megatron.data.corpus import write_standard_library_corpus
from phi1_megatron.data.definition import load_definition
from phi1_megatron.data.documents import iterate_documents
from phi1_megatron.data.preprocess import PreprocessOptions, preprocess
from phi1_megatron.data.report import read_report
from phi1_megatron.data.tokenizer import Tokenizer, train_bpe
from phi1_megatron.errors import DataError, UsageError
from phi1_megatron.planning.flops import count_parameters
from phi1_megatron.training.launch import launch_training
from phi1_megatron.training.metrics import read_metrics

RECIPE = Path(__file__).parent.parent / "examples" / "recipes" / "phi1_tiny_cpu.toml"
MARKER = "quickstart.txt"
PROMPTS = (
    'def read_text(path):\n    """',
    "import os\nimport sys\n\n\nclass ",
    "for name in names:\n    if ",
)


@dataclass
class Quickstart:
    """Where everything lies, and what each stage found."""

    folder: Path
    recipe: Path
    tokenizer_source: Path | None
    overrides: tuple[str, ...]
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    largest_difference: float | None = None

    @property
    def corpus(self) -> Path:
        """The documents."""
        return self.folder / "corpus.jsonl"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer's folder."""
        return self.folder / "tokenizer"

    @property
    def data(self) -> Path:
        """Prefix of the indexed data set."""
        return self.folder / "data" / "corpus_text_document"

    @property
    def run(self) -> Path:
        """The run folder of the training."""
        return self.folder / "run"

    @property
    def exported(self) -> Path:
        """The Hugging Face folder."""
        return self.folder / "huggingface"

    @contextmanager
    def stage(self, number: int, name: str, what: str) -> Iterator[None]:
        """Announce a stage and time it."""
        self.console.print(f"\n[bold cyan]{number}/6 {name}[/] {what}", highlight=False)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def run_quickstart(
    folder: Path, recipe: Path, tokenizer: Path | None, overrides: tuple[str, ...], fresh: bool
) -> None:
    """Corpus, tokenizer, data set, training, export, completions, and a summary.

    Raises:
        UsageError: the folder was made with other settings, or is not a quickstart's.
    """
    quick = Quickstart(folder, recipe, tokenizer, overrides, Console())
    model = load_recipe(recipe, overrides).model
    _claim(quick, fresh)
    with quick.stage(1, "Corpus", "the Python standard library of this interpreter"):
        _corpus(quick)
    with quick.stage(2, "Tokenizer", "a byte-level BPE with CodeGen's whitespace runs"):
        vocab_size = _tokenizer(quick, model.vocab_size)
    with quick.stage(3, "Preprocess", "documents to .bin and .idx"):
        _preprocess(quick)
    config = _config(quick, vocab_size)
    size = f"{count_parameters(config.model).total:,} parameters"
    with quick.stage(4, "Train", f"{recipe.name}, {size}"):
        _train(quick, config)
    with quick.stage(5, "Export", "to Hugging Face, logits compared"):
        _export(quick)
    with quick.stage(6, "Generate", "what the model writes (dim: the prompt)"):
        _generate(quick)
    _summary(quick, config)


def _claim(quick: Quickstart, fresh: bool) -> None:
    """Make the folder ours, or find that it is, with the same settings."""
    settings = "\n".join(
        [
            "made by phi1 quickstart",
            str(quick.recipe),
            str(quick.tokenizer_source),
            *quick.overrides,
        ]
    )
    marker = quick.folder / MARKER
    if fresh and marker.is_file():
        shutil.rmtree(quick.folder)
    if marker.is_file():
        if marker.read_text(encoding="utf-8") != settings:
            raise UsageError(
                f"{quick.folder} was made with another recipe, tokenizer or overrides; --fresh "
                "starts anew, --folder names another place"
            )
        return
    if quick.folder.exists() and any(quick.folder.iterdir()):
        raise UsageError(f"{quick.folder} holds files that are no quickstart's; name another place")
    quick.folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(settings, encoding="utf-8")


def _corpus(quick: Quickstart) -> None:
    if not quick.corpus.exists():
        with progress_bar(quick.console, "Collecting") as show:
            write_standard_library_corpus(
                quick.corpus, lambda done, total: show(done, total, f"{done} of {total} files")
            )
    megabytes = quick.corpus.stat().st_size / 1e6
    quick.console.print(f"{megabytes:.1f} MB of commented code in {quick.corpus}", soft_wrap=True)


def _tokenizer(quick: Quickstart, wanted: int) -> int:
    if not (quick.tokenizer / "tokenizer.json").exists():
        if quick.tokenizer_source is not None:
            tokenizer = Tokenizer.load(quick.tokenizer_source)
        else:
            with progress_bar(quick.console, "Training BPE") as show:
                texts = (document.text for document in iterate_documents([str(quick.corpus)]))
                tokenizer = train_bpe(
                    texts,
                    wanted,
                    on_progress=lambda characters, documents: show(
                        documents, 0, f"{documents:,} documents, {characters / 1e6:.1f}M characters"
                    ),
                )
        tokenizer.save(quick.tokenizer)
    vocab_size = Tokenizer.load(quick.tokenizer).vocab_size
    quick.console.print(f"{vocab_size:,} tokens in {quick.tokenizer}", soft_wrap=True)
    return vocab_size


def _preprocess(quick: Quickstart) -> None:
    report = read_report(quick.data)
    if report is None:
        options = PreprocessOptions(
            inputs=(str(quick.corpus),),
            output_prefix=quick.data.with_name("corpus"),
            tokenizer=load_definition(quick.tokenizer),
            append_eod=True,
        )
        report = run_with_progress(lambda show: preprocess(options, show)).datasets[0]
    quick.console.print(
        f"{report.tokens:,} tokens in {quick.data}.bin and .idx\n"
        f"unigram entropy {report.unigram_entropy_nats:.3f} nats a token: what knowing only how "
        "often each token comes would reach",
        soft_wrap=False,
    )


def _config(quick: Quickstart, vocab_size: int) -> RunConfig:
    return load_recipe(quick.recipe, _overrides(quick, vocab_size))


def _overrides(quick: Quickstart, vocab_size: int) -> list[str]:
    blend = str(quick.data).replace("\\", "\\\\").replace('"', '\\"')
    return [
        *quick.overrides,
        f'data.blend=["{blend}"]',
        f"data.tokenizer='{quick.tokenizer}'",
        f"model.vocab_size={vocab_size}",
    ]


def _train(quick: Quickstart, config: RunConfig) -> None:
    overrides = _overrides(quick, config.model.vocab_size)
    launch_training(config, quick.recipe, overrides, quick.run, None)


def _export(quick: Quickstart) -> None:
    done = (quick.exported / MANIFEST).is_file()
    with weights_progress("Exporting") as on_progress:
        made = export_checkpoint(quick.run, quick.exported, force=done, on_progress=on_progress)
    assert made.comparison is not None
    quick.largest_difference = made.comparison.max_abs_difference
    quick.console.print(
        f"transformers loads it; largest difference of {made.comparison.num_tokens} tokens' "
        f"logits: {quick.largest_difference:.1e}",
        highlight=False,
    )


def _generate(quick: Quickstart) -> None:
    from phi1_megatron.inference.generation import Generator

    with quick.console.status("Generating ..."):
        answers = Generator(quick.exported, "cpu").complete(list(PROMPTS), max_new_tokens=40)
    for prompt, (completion, *_) in zip(PROMPTS, answers, strict=True):
        quick.console.rule(style="dim")
        show_completion(quick.console, prompt, completion)
    quick.console.rule(style="dim")


def _summary(quick: Quickstart, config: RunConfig) -> None:
    lines = list(read_metrics(quick.run / "metrics.jsonl"))
    report = read_report(quick.data)
    if not lines or report is None:
        raise DataError(f"{quick.run} or {quick.data} has no record of its work; use --fresh")
    last, entropy = lines[-1], report.unigram_entropy_nats
    recent = lines[-20:]
    loss = math.fsum(line["loss"] for line in recent) / len(recent)
    speed = sorted(line["tokens_per_second"] for line in lines)[len(lines) // 2]
    validation = next(
        (line["validation_loss"] for line in reversed(lines) if line["validation_loss"]), None
    )
    table = Table(title="Quickstart", title_style="bold", show_header=False, box=None, width=78)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "model": f"phi-1 shape, {count_parameters(config.model).total:,} parameters",
        "trained": f"{last['consumed_tokens']:,} tokens in {last['step']} steps, "
        f"{speed:,.0f} tokens/s (median)",
        "unigram entropy": f"{entropy:.3f} nats a token",
        "training loss": f"{loss:.3f} (mean of the last {len(recent)} steps), "
        f"{abs(entropy - loss):.3f} {'below' if loss < entropy else 'ABOVE'} it",
        "validation loss": f"{validation:.3f}" if validation else "not measured",
        "export": f"largest logit difference to transformers {quick.largest_difference:.1e}",
        "seconds": ", ".join(f"{name} {spent:.0f}" for name, spent in quick.seconds.items()),
        "": "",
        "run folder": f"{quick.run} (config.toml, metrics.jsonl, tensorboard/, checkpoints/)",
        "loss plot": str(quick.run / "loss.png"),
        "Hugging Face": str(quick.exported),
        "try it": f"phi1 generate {shlex.quote(str(quick.exported))} --prompt 'def '",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    quick.console.print()
    quick.console.print(table)
