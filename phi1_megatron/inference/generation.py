"""Completions from an exported folder, through transformers' own cached decoding.

Prompts of different lengths share a batch by padding on the left. CodeGen's tokenizer has no PAD,
so the end-of-text token fills the gap and an explicit mask hides it; transformers derives each
row's positions from the mask. What is drawn for a row depends on its own seed alone, never on its
neighbours: the same seed gives the same sample at any batch size (up to the rounding of the
arithmetic, which is why the CPU computes in fp32).

Tensors: token ids and masks ``[b, s]`` int64, scores ``[b, V]`` fp32; ``V`` is the padded
vocabulary, of which the rows beyond the tokenizer's are never chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from phi1_megatron.checkpoint.hf_folder import quiet_transformers, read_model_config
from phi1_megatron.data.tokenizer import Tokenizer
from phi1_megatron.errors import CheckpointError, UsageError

FinishReason = Literal["stop", "end_of_text", "length"]
_STOP_WINDOW_TOKENS = 16


@dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    text: str
    """The completion without the prompt, ended before the earliest stop string."""
    finish_reason: FinishReason
    """A stop string, the end-of-text token, or ``max_new_tokens`` reached."""
    num_tokens: int
    """Tokens generated, those of a stop string included, the end-of-text token not."""
    num_prompt_tokens: int
    """Tokens of the prompt as the model saw it."""
    num_cut_tokens: int
    """Tokens cut from the prompt's left, because it did not fit beside ``max_new_tokens``."""


@dataclass(frozen=True)
class _Row:
    """One sequence to generate."""

    prompt: int
    ids: list[int]
    num_cut: int
    seed: int


class Generator:
    """An exported model and its tokenizer, ready to complete prompts.

    Raises:
        CheckpointError: the folder is no exported model, or has no tokenizer.
    """

    def __init__(
        self, folder: Path, device: str = "auto", dtype: torch.dtype | None = None
    ) -> None:
        """Load the model.

        Args:
            folder: a Hugging Face folder of a phi model.
            device: ``auto`` takes CUDA where there is one.
            dtype: by default the stored type on CUDA, and fp32 on the CPU.
        """
        from transformers import AutoModelForCausalLM

        self.model_config = read_model_config(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"{folder} holds no tokenizer.json, so its tokens have no text; "
                "export the checkpoint again with --tokenizer"
            )
        self.tokenizer = Tokenizer.load(folder)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        chosen: Any = dtype or (torch.float32 if self.device.type == "cpu" else "auto")
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen)
        self._model = model.eval().to(self.device)

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_samples: int = 1,
        stop: Sequence[str] = (),
        seed: int = 0,
        batch_size: int = 8,
        long_prompts: Literal["cut", "refuse"] = "cut",
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """Complete each prompt ``num_samples`` times.

        Args:
            prompts: texts, taken as they are, trailing whitespace included. An empty one starts
                a new document.
            max_new_tokens: tokens generated at most.
            temperature: 0 takes the likeliest token always (greedy); 1 samples as the model says.
            top_p: sample among the likeliest tokens that together have this probability.
            num_samples: completions of each prompt.
            stop: strings that end a completion; looked for in its text, never among token ids.
            seed: sample j of prompt i depends on ``seed``, i and j alone.
            batch_size: sequences generated at once; changes the speed, not the text.
            long_prompts: what to do with a prompt that leaves less than ``max_new_tokens`` of the
                model's positions: cut its left, or refuse it.
            on_progress: called with (sequences done, sequences in all).

        Returns:
            For each prompt its completions, in order.

        Raises:
            UsageError: a number is out of its range, or a prompt is too long.
        """
        self._check(max_new_tokens, temperature, top_p, num_samples, stop, batch_size)
        rows = [
            row
            for index, prompt in enumerate(prompts)
            for row in self._rows(index, prompt, max_new_tokens, num_samples, seed, long_prompts)
        ]
        # Neighbours of like length waste the least on padding; the order of the answer is kept.
        order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
        results: dict[int, Completion] = {}
        for chosen in _batches(order, batch_size):
            batch = [rows[number] for number in chosen]
            generated = self._generate(batch, max_new_tokens, temperature, top_p, stop)
            for number, row, ids in zip(chosen, batch, generated, strict=True):
                results[number] = self._finish(row, ids, stop)
            if on_progress is not None:
                on_progress(len(results), len(rows))
        completions: list[list[Completion]] = [[] for _ in prompts]
        for number, row in enumerate(rows):
            completions[row.prompt].append(results[number])
        return completions

    def _check(
        self,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        num_samples: int,
        stop: Sequence[str],
        batch_size: int,
    ) -> None:
        positions = self.model_config.max_position_embeddings
        if not 1 <= max_new_tokens < positions:
            raise UsageError(
                f"max_new_tokens {max_new_tokens} must lie between 1 and {positions - 1}: the "
                f"model has {positions} positions, and a prompt needs at least one"
            )
        if not temperature >= 0.0:
            raise UsageError(f"temperature {temperature:g} must be 0 (greedy) or more")
        if not 0.0 < top_p <= 1.0:
            raise UsageError(f"top_p {top_p:g} must lie above 0 and not above 1")
        if num_samples < 1 or batch_size < 1:
            raise UsageError(
                f"num_samples {num_samples} and batch_size {batch_size} must be 1 or more"
            )
        if num_samples > 1 and temperature == 0.0:
            raise UsageError(
                f"{num_samples} greedy samples of a prompt would all be the same; "
                "give a temperature above 0, or num_samples 1"
            )
        if "" in stop:
            raise UsageError("an empty stop string would end every completion before it begins")

    def _rows(
        self,
        index: int,
        prompt: str,
        max_new_tokens: int,
        num_samples: int,
        seed: int,
        long_prompts: Literal["cut", "refuse"],
    ) -> Iterator[_Row]:
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eod_id]
        room = self.model_config.max_position_embeddings - max_new_tokens
        num_cut = max(0, len(ids) - room)
        if num_cut and long_prompts == "refuse":
            raise UsageError(
                f"prompt {index} has {len(ids)} tokens and {max_new_tokens} more are to follow, "
                f"{len(ids) + max_new_tokens} in all; the model has "
                f"{self.model_config.max_position_embeddings} positions"
            )
        for sample in range(num_samples):
            yield _Row(index, ids[num_cut:], num_cut, _row_seed(seed, index, sample))

    def _generate(
        self,
        batch: list[_Row],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        stop: Sequence[str],
    ) -> list[list[int]]:
        """The new token ids of each row, up to the end-of-text token, where there is one."""
        from transformers import GenerationConfig

        width = max(len(row.ids) for row in batch)
        tokens = torch.full((len(batch), width), self.tokenizer.eod_id)
        mask = torch.zeros_like(tokens)
        for number, row in enumerate(batch):
            tokens[number, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[number, width - len(row.ids) :] = 1
        processors: list[Callable[[Tensor, Tensor], Tensor]] = [
            _KnownTokens(self.tokenizer.vocab_size)
        ]
        if temperature > 0.0:
            seeds = [row.seed for row in batch]
            processors.append(_Sampling(seeds, width, max_new_tokens, temperature, top_p))
        with quiet_transformers(), torch.inference_mode():
            output = self._model.generate(
                tokens.to(self.device),
                attention_mask=mask.to(self.device),
                # Greedy always: where sampling is asked for, the processor has drawn already.
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=self.tokenizer.eod_id,
                    pad_token_id=self.tokenizer.eod_id,
                ),
                logits_processor=processors,
                stopping_criteria=[_StopStrings(self.tokenizer, stop, width)] if stop else [],
            )
        return [_until(ids, self.tokenizer.eod_id) for ids in output[:, width:].tolist()]

    def _finish(self, row: _Row, ids: list[int], stop: Sequence[str]) -> Completion:
        ended = self.tokenizer.eod_id in ids
        ids = ids[:-1] if ended else ids
        # Decoded together with the prompt: a character may lie across the border, and some
        # tokenizers drop the space before a text's first word.
        before = self.tokenizer.decode(row.ids)
        whole = self.tokenizer.decode(row.ids + ids)
        text = whole[len(before) :] if whole.startswith(before) else self.tokenizer.decode(ids)
        found = [place for place in (text.find(string) for string in stop) if place >= 0]
        reason: FinishReason = "stop" if found else "end_of_text" if ended else "length"
        return Completion(
            text=text[: min(found)] if found else text,
            finish_reason=reason,
            num_tokens=len(ids),
            num_prompt_tokens=len(row.ids),
            num_cut_tokens=row.num_cut,
        )


class _KnownTokens:
    """Never choose a row of the vocabulary's padding: it was never trained and has no text."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self._vocab_size :] = -torch.inf
        return scores


class _Sampling:
    """Draw each row's next token by one uniform number of its own; scores become that choice.

    The number picks from the cumulated probabilities, likeliest first, cut at ``top_p``.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        prompt_width: int,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> None:
        self._prompt_width = prompt_width
        self._temperature = temperature
        self._top_p = top_p
        self._uniforms = torch.stack(
            [
                torch.rand(
                    max_new_tokens,
                    generator=torch.Generator().manual_seed(seed),
                    dtype=torch.float64,
                )
                for seed in seeds
            ]
        )

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        step = tokens.shape[1] - self._prompt_width
        scaled = scores.double() / self._temperature
        probabilities, ids = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        cumulated = probabilities.cumsum(dim=-1)
        # The smallest set that reaches top_p: as many as lie below it, and one more.
        kept = (cumulated < self._top_p).sum(dim=-1, keepdim=True)
        kept = kept.clamp(max=scores.shape[-1] - 1)
        uniform = self._uniforms[:, step, None].to(scores.device)
        target = uniform * cumulated.gather(-1, kept)
        place = torch.searchsorted(cumulated, target, right=True).minimum(kept)
        return torch.full_like(scores, -torch.inf).scatter_(-1, ids.gather(-1, place), 0.0)


class _StopStrings:
    """Which rows hold a stop string near their end, so that they need no more tokens.

    Only an early end: the text is cut on the whole completion afterwards.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt_width: int) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._prompt_width = prompt_width
        # A token has at least one byte of text, a character of a stop string at most four.
        longest = max(len(string.encode()) for string in stop)
        self._window = longest + _STOP_WINDOW_TOKENS

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        start = max(self._prompt_width, tokens.shape[1] - self._window)
        texts = [self._tokenizer.decode(ids) for ids in tokens[:, start:].tolist()]
        done = [any(string in text for string in self._stop) for text in texts]
        return torch.tensor(done, device=tokens.device)


def _row_seed(seed: int, prompt: int, sample: int) -> int:
    """A seed of 63 bits that differs for every (seed, prompt, sample)."""
    digest = hashlib.sha256(f"{seed}/{prompt}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _batches(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _until(ids: list[int], end: int) -> list[int]:
    """``ids`` up to and with the first ``end``."""
    return ids[: ids.index(end) + 1] if end in ids else ids
