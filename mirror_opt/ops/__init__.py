r"""Every operator of the package: schema, fake implementation, gradients, vmap rule.

With S(u) = gain psi(u) (``reference``), elementwise,

    separable_forward     S(u)
    separable_inverse     S^-1(t), and a status
    separable_step        S^-1(S(x) - lr g), and a status
    separable_rotated     S between a change of basis along one mode and back, summed over terms
    separable_backward    gradients of S, or of S^-1, in u, gain, w, s and c
    separable_step_       the step of ``optim.MirrorDescent`` on a list of tensors, in place
    exceeds               whether some entry of a list of tensors is above a bound

u, t, x and g are ``(*)``; gain has as many dimensions and broadcasts against u; w, s and c are
``(K, *)`` and broadcast against ``u[None]``. All have one dtype. A status is 0-dim int32, the worst
``newton.Status`` of all elements, on the device of u; entries that were not solved are NaN.

The operators are in ``torch.ops.mirror_opt``, and ``backends`` decides which code runs them. The
functions here are how to call them.
"""

from mirror_opt.ops.kronecker import separable_rotated
from mirror_opt.ops.multi_tensor import exceeds, separable_step_
from mirror_opt.ops.separable import separable_forward, separable_inverse, separable_step

__all__ = [
    "exceeds",
    "separable_forward",
    "separable_inverse",
    "separable_rotated",
    "separable_step",
    "separable_step_",
]
