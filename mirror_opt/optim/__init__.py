"""Mirror descent as a ``torch.optim.Optimizer``."""

from mirror_opt.optim.mirror_descent import MirrorDescent

__all__ = ["MirrorDescent"]
