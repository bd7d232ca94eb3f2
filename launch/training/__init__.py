"""A run: its start, its loop, its logs, its checkpoints and its end."""
