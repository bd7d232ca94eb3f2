"""The parts of tests/bench/gpu.py: each a module that runs in a process of its own and prints one JSON object."""
