"""Many pipelines that average their weights while they train, and may come and go (docs/replicas.md)."""

import os

# torchft tells every heartbeat and quorum; it reads this once, when it is first imported.
os.environ.setdefault("RUST_LOG", "error")
