"""What each stage does when, and the proof that it cannot deadlock. Pure: imports neither torch nor a host."""
