"""Update rules under delay, compared on one device: what ``python -m noflush compare`` is made of."""
