"""Megatron GPT training under noflush: entry points, and the parts they are made of."""
