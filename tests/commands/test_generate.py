"""What ``phi1 generate`` reads and prints, around the generation itself."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from phi1_megatron.checkpoint.convert import export_huggingface
from phi1_megatron.checkpoint.hf_mapping import expected_shapes
from phi1_megatron.commands.generate import generate, show_completion
from phi1_megatron.config.schema import ModelConfig
from phi1_megatron.data.tokenizer import train_bpe
from phi1_megatron.errors import UsageError
from phi1_megatron.inference.generation import Completion

CODE = "x = d['[bold]a[/bold]']\n\tif x:  # :smile: " + "long " * 40 + "\n\n  "


def printed(prompt: str, text: str, terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream,
        width=80,
        force_terminal=terminal,
        color_system="standard" if terminal else "auto",
    )
    show_completion(console, prompt, Completion(text, "length", 1, 1, 0))
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import torch

    train_bpe(["def f():\n    pass\n"] * 4, vocab_size=300).save(tmp_path / "tokenizer")
    model = ModelConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=16,
        vocab_size=300,
        make_vocab_size_divisible_by=64,
        max_position_embeddings=64,
    )
    weights = {name: torch.zeros(shape) for name, shape in expected_shapes(model).items()}
    weights["output_layer.bias"][ord("a") - ord("!")] = 9.0  # byte-level ids start at "!"
    export_huggingface(
        weights.__getitem__, model, tmp_path / "model", tokenizer=tmp_path / "tokenizer"
    )
    return tmp_path / "model"


def test_code_is_printed_as_it_is() -> None:
    assert printed("def f", CODE, terminal=False) == "def f" + CODE + "\n"


def test_on_a_terminal_the_prompt_is_dim_and_the_completion_bright() -> None:
    assert printed("def f", "(a):\t[b]", terminal=True) == (
        "\x1b[2mdef f\x1b[0m\x1b[1m(a):\t[b]\x1b[0m\n"
    )


def test_a_terminal_does_not_obey_control_sequences_of_the_model() -> None:
    assert "\x1b[31m" not in printed("", "\x1b[31mred", terminal=True)
    assert printed("", "\x1b[31mred", terminal=False) == "\x1b[31mred\n"


def test_prompts_come_from_options_and_files_and_keep_their_whitespace(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"prompt": f"p{n}\n "}) for n in range(2)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    generate(folder, prompt=["  x"], prompts=tmp_path / "prompts.jsonl", max_new_tokens=3)
    out = capsys.readouterr().out
    for text in ("  xaaa\n", "p0\n aaa\n", "p1\n aaa\n"):
        assert text in out
    assert "prompt 3 of 3" in out


def test_one_completion_is_printed_alone_and_notes_go_to_standard_error(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.py").write_text("def f():\n")
    generate(folder, prompts=tmp_path / "prompt.py", max_new_tokens=4)
    captured = capsys.readouterr()
    assert captured.out == "def f():\naaaa\n"
    assert "4 tokens, ended at --max-new-tokens" in captured.err


def test_a_stop_string_may_hold_a_written_line_break(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(folder, prompt=["x"], max_new_tokens=4, stop=["\\n", "aa"])
    assert capsys.readouterr().out == "x\n"


def test_a_cut_prompt_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(folder, prompt=["a" * 70], max_new_tokens=4)
    assert "its first 10 tokens were cut, 60 kept" in capsys.readouterr().err


def test_nothing_to_complete_and_bad_prompt_files_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to complete"):
        generate(folder)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(UsageError, match=r"line 2 of .*bad.jsonl"):
        generate(folder, prompts=tmp_path / "bad.jsonl")
    with pytest.raises(UsageError, match="cannot be read"):
        generate(folder, prompts=tmp_path / "none.txt")
