"""One pass over memory for a stage's whole update. Knows torch and triton, no framework, and no method by name.

`eager` runs a method's own arithmetic, as it is or through `torch.compile`; `launch` runs the Triton kernels of
`fused`, into which a method's functions are compiled; `norm` finds the gradient norm; `choice` says which of them a run
uses, and why.
"""
