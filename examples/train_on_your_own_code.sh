#!/bin/sh
# From documents of your own to a trained model and its completions, with the command line alone.
#
#   sh examples/train_on_your_own_code.sh DOCUMENTS [FOLDER] [section.field=value ...]
#
# DOCUMENTS is a JSONL or parquet file, or a folder of them, with the text in the field "text"
# (examples/code_to_jsonl.sh makes such a file of a folder of source files). Everything is put into
# FOLDER (runs/my_code by default). What follows is laid over the recipe: training.train_steps=1000.
#
# From the environment: VOCAB_SIZE (4096), RECIPE (examples/recipes/phi1_tiny_cpu.toml), PROMPT.
# Run it again, and it goes on after the last stage that was finished.
set -eu

if [ $# -lt 1 ]; then
    echo "usage: sh examples/train_on_your_own_code.sh DOCUMENTS [FOLDER] [FIELD=VALUE ...]" >&2
    exit 2
fi
documents=$1
folder=${2:-runs/my_code}
shift
[ $# -eq 0 ] || shift # what is left are overrides

vocab_size=${VOCAB_SIZE:-4096}
recipe=${RECIPE:-examples/recipes/phi1_tiny_cpu.toml}
prompt=${PROMPT:-"def "}
data=$folder/data/mine_text_document
command -v phi1 >/dev/null || {
    echo "phi1 is not on the path: . .venv/bin/activate" >&2
    exit 1
}

# 1. A tokenizer of this text: byte-level BPE with CodeGen's whitespace runs.
[ -e "$folder/tokenizer/tokenizer.json" ] ||
    phi1 tokenizer train "$documents" --output "$folder/tokenizer" --vocab-size "$vocab_size"

# 2. Documents to .bin and .idx, each ended by the end-of-document token.
[ -e "$data.report.json" ] ||
    phi1 preprocess --input "$documents" --output-prefix "$folder/data/mine" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$folder/tokenizer" --append-eod
phi1 data verify "$data"

# 3. Train. The same line again goes on from the newest checkpoint, or finds the run finished.
phi1 train "$recipe" --run-dir "$folder/run" "data.blend=['$data']" \
    "data.tokenizer='$folder/tokenizer'" "model.vocab_size=$vocab_size" "$@"

# 4. A Hugging Face folder, its logits compared with ours.
phi1 export "$folder/run" "$folder/huggingface" --force

# 5. What it writes.
phi1 generate "$folder/huggingface" --prompt "$prompt" --max-new-tokens 48
echo "Everything lies in $folder; its loss: $folder/run/loss.png"
