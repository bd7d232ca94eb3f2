"""The parts of tests/bench/paper.py."""
