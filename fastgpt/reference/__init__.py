"""The definition of every op in plain PyTorch: what the kernels are proven against, and the last backend.

Each module has the definition itself (differentiable by autograd, exact in fp64), the condition of its outputs
and gradients (how large an error rounding alone may cause), and the backend functions made from them.
"""
