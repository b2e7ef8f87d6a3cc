"""What the multi-tensor step takes: one order for the operator and every backend."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["CHANGED", "Step"]

Tensors = Sequence[Tensor]

CHANGED = (0, 6, 8)  # of ``Step.lists``: parameters, momentum, dual state


class Step(NamedTuple):
    """The arguments of the operator ``separable_step_``, which says what each is, in its order.

    A list has one tensor for each parameter, or none for what there is not.
    """

    params: Tensors
    grads: Tensors
    lr: Tensor
    gains: Tensors
    ws: Tensors
    ss: Tensors
    cs: Tensors
    buffers: Tensors
    anchors: Tensors
    duals: Tensors
    dual_inits: Tensors
    grad_scale: Tensor | None
    found_inf: Tensor | None
    status: Tensor
    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    primal: bool
    sigma: str

    @property
    def lists(self) -> tuple[Tensors, ...]:
        """All lists of tensors."""
        return (
            self.params, self.grads, self.gains, self.ws, self.ss, self.cs, self.buffers,
            self.anchors, self.duals, self.dual_inits,
        )  # fmt: skip
