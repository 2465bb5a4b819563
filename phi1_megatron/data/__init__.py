"""Text to tokens to training samples.

``documents`` reads text, ``tokenizer`` turns it into ids, ``indexed`` writes and reads
megatron-core's ``.bin``/``.idx`` files, ``preprocess`` joins the three, ``corpus`` makes a first
corpus out of the running Python's standard library. None of these imports torch or megatron.
"""
