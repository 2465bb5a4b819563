"""Documents to megatron-core's .bin and .idx, with Megatron-LM's flag names: ``phi1 preprocess``.

python tools/preprocess/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
    --tokenizer-type CodeGenTokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod
"""

from phi1_megatron.cli import run_single

if __name__ == "__main__":
    run_single("phi1_megatron.commands.preprocess:preprocess", prog="preprocess_data.py")
