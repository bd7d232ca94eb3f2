"""Text to tokens to samples: tokenizers, megatron-core's datasets, and the order in which ranks read them."""
