"""What happens when a rank dies, hangs or breaks: noticing, blaming, ending in bounded time. No host."""
