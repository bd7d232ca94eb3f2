"""A GPT of megatron-core's parts, as the layers of a DeepSpeed pipeline."""
