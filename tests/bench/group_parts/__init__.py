"""Parts of the benchmarks of groups."""
