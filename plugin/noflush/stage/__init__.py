"""One pipeline stage at work, over torch.distributed. No host."""
