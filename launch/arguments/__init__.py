"""Megatron's command line: its options as data, what they mean here, and the checks across them."""
