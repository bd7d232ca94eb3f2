"""Weights out and in: a pipeline checkpoint, one state dict in megatron-core's names, a Hugging Face folder."""
