"""What a person would write with Hugging Face's fast tokenizer, measured as a contender.

JSONL line by line, ``encode_batch_fast`` on batches (its threads use all cores), megatron-core's
own ``IndexedDatasetBuilder``. A tokenizer of ``transformers``, when called, goes to
``encode_batch``, which also keeps the offsets and takes about twice as long on code;
``--method encode_batch`` measures that.

Run as ``python -m phi1_megatron.benchmark.huggingface_baseline``. It uses nothing of this package.
"""

from __future__ import annotations

import argparse
import json


def main(arguments: list[str] | None = None) -> None:
    """Tokenize ``--input`` into ``{output_prefix}_text_document.bin`` and ``.idx``."""
    parser = argparse.ArgumentParser(prog="huggingface_baseline", description=main.__doc__)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--tokenizer-model", required=True, help="a tokenizer.json")
    parser.add_argument("--eod-token", default="<|endoftext|>")
    parser.add_argument("--batch-documents", type=int, default=1000)
    parser.add_argument(
        "--method", choices=("encode_batch_fast", "encode_batch"), default="encode_batch_fast"
    )
    options = parser.parse_args(arguments)

    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(options.tokenizer_model)
    eod = tokenizer.token_to_id(options.eod_token)
    if eod is None:
        parser.error(f"{options.eod_token} is not in the vocabulary")
    encode_batch = getattr(tokenizer, options.method)
    prefix = f"{options.output_prefix}_text_document"
    builder = IndexedDatasetBuilder(
        f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.get_vocab_size())
    )

    def write(texts: list[str]) -> None:
        for encoding in encode_batch(texts, add_special_tokens=False):
            ids = [*encoding.ids, eod]
            builder.add_document(ids, [len(ids)])

    texts: list[str] = []
    with open(options.input, encoding="utf-8") as lines:  # noqa: PTH123 - as one would write it
        for line in lines:
            texts.append(json.loads(line)["text"])
            if len(texts) == options.batch_documents:
                write(texts)
                texts = []
    write(texts)
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main()
