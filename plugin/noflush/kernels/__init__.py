"""One pass over memory for a stage's whole update. Knows torch and triton, and no framework.

`scalars` computes an update's few numbers from hyper-parameters and step; `reference` is the arithmetic in plain
torch, the oracle; `host` runs it, eagerly or through `torch.compile`; `device` runs the Triton kernels of `fused`;
`norm` finds the gradient norm; `choice` says which of them a run uses, and why.
"""
