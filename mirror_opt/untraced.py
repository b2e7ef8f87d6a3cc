"""Functions that a compiled graph leaves out."""

# What torch's own optimizers use. As torch.compiler.disable, but the compiler is loaded by the
# first call: loading it takes as long as the rest of torch, and needs a temporary directory.
from torch._compile import _disable_dynamo as untraced

__all__ = ["untraced"]
