"""A Hugging Face folder on disk: its files, written whole or not at all, and read tensor by tensor.

What a folder of ours holds: ``config.json``, ``generation_config.json``, ``model*.safetensors``
(and an index where there are several), the tokenizer's files, ``README.md`` and
``phi1_export.json``, which keeps what Hugging Face's configuration has no word for (the real
vocabulary under the padded one, the dropouts of the training) and marks the folder as ours.
The weights themselves are in ``hf_weights.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from phi1_megatron.config.schema import ModelConfig
from phi1_megatron.data.tokenizer import Tokenizer
from phi1_megatron.errors import CheckpointError, UsageError

MANIFEST = "phi1_export.json"
ARCHITECTURE = "PhiForCausalLM"
CODEGEN_VOCAB_SIZE, CODEGEN_END_OF_TEXT = 50295, 50256
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


# ---- the folder ------------------------------------------------------------------------------


@contextlib.contextmanager
def staged_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of ``target`` that becomes ``target`` when the block ends well.

    When it does not, nothing is left. With ``force`` a previous export is replaced.

    Raises:
        UsageError: ``target`` holds something that is not ours to replace.
        CheckpointError: the disk is full, or the place cannot be written.
    """
    target = target.expanduser().absolute()
    _check_target(target, force)
    stem, mine = f".{target.name}.partial-{socket.gethostname()}-", os.getpid()
    staging, replaced = (target.with_name(f"{stem}{mine}{end}") for end in ("", "-replaced"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target.parent, stem)
        staging.mkdir()
        yield staging
        sync(staging)
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
        sync(target.parent)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error.strerror or error}; nothing was left there"
        ) from error
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for folder in (staging, replaced):
            shutil.rmtree(folder, ignore_errors=True)


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; name a folder that does not exist yet")
    if any(target.iterdir()):
        if not (target / MANIFEST).is_file():
            raise UsageError(
                f"{target} is not empty and is no earlier export (it holds no {MANIFEST}); "
                "name another folder"
            )
        if not force:
            raise UsageError(
                f"{target} holds an earlier export; give --force to replace it, "
                "or name another folder"
            )


def _remove_leftovers(parent: Path, stem: str) -> None:
    """Remove what exports of this target, killed on this machine, left behind."""
    for folder in parent.glob(f"{stem}*"):
        pid = folder.name.removeprefix(stem)
        if pid.isdigit() and not _is_running(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sync(path: Path) -> None:
    """Make sure that a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as indented JSON, on the disk when this returns."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(path)


# ---- configuration and tokenizer -------------------------------------------------------------


def huggingface_config(
    model: ModelConfig, dtype: torch.dtype, end_of_text: int | None
) -> dict[str, Any]:
    """``config.json`` of ``model``.

    The rotary values stand there twice: transformers 5 reads ``rope_parameters``, version 4 and
    other engines the top level (where phi-2's 0.4 would otherwise quietly become 0.5). bos and eos
    are always written, for PhiConfig's own defaults (1 and 2) are wrong for this tokenizer.
    Dropouts are 0.0, as in the released configuration.
    """
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "phi",
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_act": "gelu_new",
        "layer_norm_eps": model.layernorm_epsilon,
        "qk_layernorm": False,
        "partial_rotary_factor": model.rotary_percent,
        "rope_theta": float(model.rotary_base),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(model.rotary_base),
            "partial_rotary_factor": model.rotary_percent,
        },
        "attention_dropout": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "dtype": name,
        "torch_dtype": name,
    }


def generation_config(end_of_text: int | None) -> dict[str, Any]:
    """``generation_config.json``: greedy, ended by the end-of-text token; there is no PAD."""
    return {
        "_from_model_config": True,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "do_sample": False,
    }


def open_tokenizer(folder: Path | None, model: ModelConfig) -> tuple[Tokenizer | None, int | None]:
    """The tokenizer and its end-of-text id; without one, the id that CodeGen's vocabulary implies.

    Raises:
        UsageError: it knows more tokens than the model has rows for.
    """
    if folder is None:
        is_codegen = model.vocab_size == CODEGEN_VOCAB_SIZE
        return None, CODEGEN_END_OF_TEXT if is_codegen else None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > model.padded_vocab_size:
        raise UsageError(
            f"the tokenizer {folder} knows {tokenizer.vocab_size} tokens and the model has "
            f"{model.padded_vocab_size} rows for them; name the tokenizer that the model's data "
            "was made with (--tokenizer)"
        )
    return tokenizer, tokenizer.eod_id


def copy_tokenizer(tokenizer: Tokenizer, source: Path, target: Path) -> None:
    """Copy the tokenizer's files into ``target``, or make the ones AutoTokenizer needs.

    ``clean_up_tokenization_spaces`` is set to false in the copy: true corrupts code (``a . b``).
    """
    if not (source / "tokenizer_config.json").is_file():
        tokenizer.save(target)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    config = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(target / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


# ---- reading ---------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``.

    Raises:
        CheckpointError: it is missing or is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} holds no {path.name}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def read_model_config(folder: Path) -> ModelConfig:
    """The architecture of a Hugging Face folder.

    The real vocabulary comes from ``phi1_export.json``, else from the tokenizer beside the
    weights, else it is taken to be all rows.

    Raises:
        CheckpointError: it is not a phi model, or one with parts that this system does not have.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import PhiConfig

    raw = read_json(folder / "config.json")
    if raw.get("model_type") != "phi" or raw.get("architectures", [ARCHITECTURE]) != [ARCHITECTURE]:
        raise CheckpointError(
            f"{folder / 'config.json'} describes model_type {raw.get('model_type')!r}, "
            f"architectures {raw.get('architectures')!r}; only 'phi' with [{ARCHITECTURE!r}] "
            "can be read"
        )
    try:
        config = PhiConfig.from_dict(raw)
        rope = config.rope_parameters
        supported = {
            "num_key_value_heads": (config.num_key_value_heads, config.num_attention_heads),
            "hidden_act": (config.hidden_act, "gelu_new"),
            "qk_layernorm": (config.qk_layernorm, False),
            "tie_word_embeddings": (config.tie_word_embeddings, False),
            "rope_type": (rope["rope_type"], "default"),
            "rope_theta": (rope["rope_theta"], int(rope["rope_theta"])),
        }
        for key, (value, wanted) in supported.items():
            if value != wanted:
                raise CheckpointError(
                    f"{folder / 'config.json'} has {key} = {value!r}; this system's phi has "
                    f"{wanted!r} alone"
                )
        fields: dict[str, Any] = {
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "ffn_hidden_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "rotary_percent": float(rope["partial_rotary_factor"]),
            "rotary_base": int(rope["rope_theta"]),
            "layernorm_epsilon": float(config.layer_norm_eps),
            "init_method_std": float(config.initializer_range),
            "attention_dropout": float(config.attention_dropout or 0.0),
            "hidden_dropout": float(config.resid_pdrop),
            "embedding_dropout": float(config.embd_pdrop),
        }
        fields |= _vocabulary(folder, config.vocab_size)
        return ModelConfig.model_validate(fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from error


def _vocabulary(folder: Path, rows: int) -> dict[str, Any]:
    """The real vocabulary and its padding that make ``rows``, and what else the manifest keeps."""
    if (folder / MANIFEST).is_file():
        model = ModelConfig.model_validate(read_json(folder / MANIFEST).get("model", {}))
        if model.padded_vocab_size == rows:
            kept = ("vocab_size", "make_vocab_size_divisible_by")
            dropouts = ("attention_dropout", "hidden_dropout", "embedding_dropout")
            return {name: getattr(model, name) for name in kept + dropouts}
    size = rows
    if (folder / "tokenizer.json").is_file():
        size = Tokenizer.load(folder).vocab_size
        if size > rows:
            raise CheckpointError(
                f"{folder} has a tokenizer of {size} tokens and a vocabulary of {rows} rows; "
                "they do not belong together"
            )
    multiples = (m for m in (1024, 512, 256, 128, 64, 1) if -(-size // m) * m == rows)
    return {"vocab_size": size, "make_vocab_size_divisible_by": next(multiples, rows)}


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block transformers prints neither advice nor progress bars; errors still show."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
