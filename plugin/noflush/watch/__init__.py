"""What a run shows of itself: traces, timelines, the progress line. No host."""
