"""phi-1 from megatron-core's blocks."""
