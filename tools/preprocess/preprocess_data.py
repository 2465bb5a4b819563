"""Documents to megatron-core's .bin and .idx, with Megatron-LM's flag names: ``phi1 preprocess``.

python tools/preprocess/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
    --tokenizer-type CodeGenTokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod
"""

from phi1_megatron.entry import preprocess_tool

if __name__ == "__main__":
    preprocess_tool()
