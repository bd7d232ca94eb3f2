"""A small GPT and a corpus every machine has: for the demo, `python -m noflush simulate`, tests and benchmarks."""
