"""``phi1 generate``: completions of prompts, from a checkpoint or an exported folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

from phi1_megatron.errors import UsageError

if TYPE_CHECKING:
    from phi1_megatron.inference.generation import Completion

_ENDED = {
    "stop": "ended at a stop string",
    "end_of_text": "ended by the model",
    "length": "ended at --max-new-tokens",
}


def generate(
    checkpoint: Path,
    *,
    prompt: Annotated[list[str] | None, Parameter(negative="")] = None,
    prompts: Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    stop: Annotated[list[str] | None, Parameter(negative="")] = None,
    batch_size: int = 8,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    r"""Complete prompts with a trained model.

    Prompts and completions go to standard output, everything else to standard error.

    Parameters
    ----------
    checkpoint
        An exported folder, a run folder (its newest checkpoint is taken) or one checkpoint; the
        latter two are exported once into the run's exports/ folder.
    prompt
        A text to complete; may be given several times. In bash, $'a\nb' holds a line break.
    prompts
        A file of prompts: .jsonl has one object a line with a "prompt"; any other is one prompt,
        and so is standard input, written as -.
    max_new_tokens
        Tokens generated at most. A prompt that does not fit beside them loses its left.
    temperature
        0 takes the likeliest token always; higher values vary more.
    top_p
        Sample among the likeliest tokens that together have this probability.
    num_samples
        Completions of each prompt.
    seed
        The same seed gives the same samples, at any batch size.
    stop
        A string that ends a completion; may be given several times. \n and \t in it stand for a
        line break and a tab.
    batch_size
        Sequences generated at once.
    device
        Where to compute; auto takes CUDA where there is one.
    """
    texts = [*(prompt or []), *(_read_prompts(prompts) if prompts else [])]
    if not texts:
        raise UsageError("there is nothing to complete; give --prompt TEXT or --prompts FILE")

    from phi1_megatron.checkpoint.export import exported_folder
    from phi1_megatron.commands.export import weights_progress
    from phi1_megatron.inference.generation import Generator

    with weights_progress("Exporting") as on_progress:
        folder = exported_folder(checkpoint, on_progress=on_progress)
    notes = Console(stderr=True, soft_wrap=True, highlight=False)
    with notes.status("Generating ..."):
        completions = Generator(folder, device).complete(
            texts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            num_samples=num_samples,
            stop=[_unescaped(string) for string in stop or []],
            seed=seed,
            batch_size=batch_size,
        )
    console = Console(highlight=False)
    several = len(texts) * num_samples > 1
    for number, (text, group) in enumerate(zip(texts, completions, strict=True), start=1):
        for sample, completion in enumerate(group, start=1):
            if several:
                title = f"prompt {number} of {len(texts)}"
                if num_samples > 1:
                    title += f", sample {sample} of {num_samples}"
                console.rule(title, style="dim")
            show_completion(console, text, completion)
            notes.print(_note(completion), style="dim italic")


def show_completion(console: Console, prompt: str, completion: Completion) -> None:
    """Print the prompt dim and the completion bright, every character as it is."""
    console.print(
        _Verbatim(prompt, "dim"), _Verbatim(completion.text, "bold"), soft_wrap=True, end=""
    )
    console.print()


def _note(completion: Completion) -> str:
    note = f"{completion.num_tokens} tokens, {_ENDED[completion.finish_reason]}"
    if completion.num_cut_tokens:
        note += (
            f"; the prompt was too long: its first {completion.num_cut_tokens} tokens were cut, "
            f"{completion.num_prompt_tokens} kept"
        )
    return note


class _Verbatim:
    """Text that rich neither wraps nor reads as markup, and whose tabs stay tabs."""

    def __init__(self, text: str, style: str) -> None:
        self._text = text
        self._style = Style.parse(style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        text = self._text
        if console.is_terminal:
            # A model may write control sequences; the reader's terminal must not obey them.
            text = "".join(
                chr(0x2400 + ord(c)) if ord(c) < 32 and c not in "\n\t" else c for c in text
            )
        yield Segment(text, self._style)


def _unescaped(string: str) -> str:
    return string.replace("\\n", "\n").replace("\\t", "\t")


def _read_prompts(path: Path) -> list[str]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts {path} cannot be read: {error}") from None
    if path.suffix != ".jsonl":
        return [text]
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f'line {number} of {path} is not an object with a "prompt": {line[:60]!r}'
            ) from None
    return prompts
