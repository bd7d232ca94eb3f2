"""megatron-core's wing. Importing this imports no host."""
