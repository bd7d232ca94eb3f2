"""What starts a training run: from a launcher, under SLURM, with Megatron's arguments."""
