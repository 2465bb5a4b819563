"""Convert checkpoints: ``convert.py SOURCE TARGET --to huggingface``; the same as phi1 convert."""

from phi1_megatron.cli import run_single

if __name__ == "__main__":
    run_single("phi1_megatron.commands.convert:convert", prog="convert.py")
