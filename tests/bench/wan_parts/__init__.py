"""Parts of tests/bench/wan.py."""
