"""Many pipelines that average their weights while they train, and may come and go (docs/replicas.md)."""
