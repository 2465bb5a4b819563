"""Checkpoints: saved whole, read in any layout, converted to Hugging Face and back."""
