"""MirrorDescent: the optimizer around the update, with its state and its checkpoints."""

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from mirror_opt.dtypes import autocast_devices
from mirror_opt.maps import Euclidean, MirrorMap
from mirror_opt.optim.checkpoint import adopt, checked, hide_state, pack_maps
from mirror_opt.optim.fused import may_fuse_scaled
from mirror_opt.optim.options import (
    RUN_OPTIONS,
    Group,
    check_group,
    check_options,
    drop_repeated,
)
from mirror_opt.optim.plan import Lists
from mirror_opt.optim.sharded import is_sharded
from mirror_opt.optim.state import States
from mirror_opt.optim.transaction import take
from mirror_opt.optim.written import Written
from mirror_opt.untraced import untraced

__all__ = ["MirrorDescent"]

_Loss = TypeVar("_Loss")


class MirrorDescent(Optimizer):
    r"""Mirror descent with momentum and decoupled weight decay, for any mirror map grad h.

    With gradient g, learning rate :math:`\gamma`, momentum :math:`\mu` and weight decay
    :math:`\lambda` (Nemirovski and Yudin 1983; Beck and Teboulle 2003):

    .. math::
        b_{k+1} = \mu b_k + g_k, \quad b_0 = 0, \qquad
        d_k = g_k + \mu b_{k+1} \text{ (Nesterov) or } b_{k+1}

    .. math::
        z_k = \nabla h((1 - \gamma \lambda) \phi_k), \qquad
        \phi_{k+1} = \nabla h^*(z_k - \gamma d_k)

    For ``maps.Euclidean()`` this is ``torch.optim.SGD``, with the weight decay of AdamW.

    **Anchor.** An anchored map acts on the displacement phi - phi_0 from an anchor phi_0, which is
    zero or the parameters as the first step finds them, kept in the state and saved.

    **Dual state.** Without one, z is computed from phi in every step. With a dual state the
    displacement zeta = z - z_0 is kept in at least float32: no rounding builds up, grad h is not
    evaluated, and zeta is the master copy of float16 and bfloat16 parameters. Weight decay acts on
    phi, so that z is then recomputed in every step from the decayed, unrounded grad h*(z).
    If parameters were changed since the last step (clipped, masked, loaded), or the map was
    replaced, this is noticed and z computed anew. Not noticed are writes that torch does not count
    (into ``p.data``, and those of its own optimizers with ``fused=True``), a map whose own tensors
    have changed, and anything between compiled steps: there, delete ``optimizer.state[p]["dual"]``.

    **NaN and Inf**, in a gradient or in what the map makes of it. A step changes all parameters and
    their state or nothing. ``"raise"`` raises FloatingPointError. ``"skip"`` skips the step, by a
    select on the device that needs no synchronisation (except with ``differentiable``).
    ``"propagate"`` does not look. None is ``"raise"`` when all parameters are on the CPU and the
    step is not compiled, else ``"skip"``. A Newton solve that fails has no result to store: its
    NewtonError (both errors are ArithmeticError) comes through unless the step is skipped.

    **Loss scaling.** With ``torch.amp.GradScaler`` a step divides by the scale itself, in at least
    float32, and leaves ``.grad`` scaled, where a fused step may be taken; else the scaler does it.
    A step that the scaler skips changes nothing.

    **Fused.** For ``maps.SeparableNeural`` a step is one pass over memory, in place, by the backend
    that ``mirror_opt.use_backend`` chooses; for ``maps.Euclidean`` in float32 or float64, without
    dual state or anchor, it is that of torch's own SGD. Where it could fail (a magnitude beyond
    1e15, and float16 always) the step is taken unfused. On an accelerator, where asking would
    synchronise, float16 is not fused, and a step that could fail is skipped, or with
    ``"propagate"`` taken, by our operator except for the elements that fail. Coefficients of a map
    are kept until its tensors are written to; a write that torch does not count is not seen.

    **CUDA graphs.** A step can be captured after one that was not, which creates the state, with
    ``nonfinite="skip"`` or ``"propagate"``, where nothing is solved outside a kernel. Anything that
    changes between replays, ``lr`` too, must be a tensor on the device. For
    ``maps.SeparableNeural`` the graph holds the coefficients of the map: capture again when the map
    has changed.

    **Sharded.** DTensor parameters (FSDP2, tensor parallelism) step on their local shards, with
    DTensor state; a map gathers what it couples across a cut (``MirrorMap.coupled``). A step that
    fails in one process fails in all of its mesh, except with ``"propagate"``, which does not ask.
    Of a compiled function these steps are left out: they run as if it were not compiled.

    **Differentiating through steps.** With ``differentiable=True`` gradients flow to the initial
    parameters, to earlier gradients, to a tensor ``lr`` and to the parameters of the map; pass
    non-leaf parameters (``p.clone()``). Else the step is outside autograd. The parameters of the
    map are never trained here.

    Args:
        params: parameters, named parameters, or dicts that define groups, each with options and a
            ``mirror_map`` of its own. Real tensors of any shape, of dtype float16, bfloat16,
            float32 or float64, in the domain of the map.
        lr: learning rate, in [0, inf): a number, or a tensor with one element, which may change
            without a compiled step being compiled again.
        mirror_map: a ``maps.MirrorMap``; a map that owns tensors is built from the parameters of
            the group that it serves. None: ``maps.Euclidean()``.
        momentum: mu, in [0, 1).
        nesterov: Nesterov momentum, as SGD's.
        weight_decay: lambda, in [0, inf).
        maximize: ascend.
        dual_state: keep zeta. None: where grad h needs a solve (``forward_is_closed`` is False).
        anchor: ``"init"``, ``"zero"``, or ``"auto"``: init for an anchored map, zero for another.
        rounding: of bfloat16 parameters: ``"nearest"``, which loses small steps where there is no
            dual state, or ``"stochastic"``, which keeps their mean. It draws from torch's
            generator. DTensors that processes share draw alike; replicas of plain tensors (DDP)
            need generators in the same state, which batches of unlike sizes part where there is
            dropout.
        foreach: use multi-tensor kernels. None: when all parameters are on an accelerator.
        fused: take fused steps. None: where there are any, unless ``foreach`` is given or the step
            is compiled. True: an InputError where there are none.
        differentiable: let autograd record the steps.
        nonfinite: ``"raise"``, ``"skip"``, ``"propagate"`` or None, see above.

    Raises:
        InputError: an option or a parameter is out of range. Nothing has changed then.

    Example:
        >>> from mirror_opt import maps
        >>> weights = torch.nn.Parameter(torch.tensor([0.5, 0.5]))
        >>> optimizer = MirrorDescent([weights], lr=1.0, mirror_map=maps.NegativeEntropy())
        >>> (weights @ torch.tensor([0.0, 1.0])).backward()
        >>> optimizer.step()
        >>> weights.detach()  # in the ratio of 1 to 1/e
        tensor([0.7311, 0.2689])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        mirror_map: MirrorMap | None = None,
        *,
        momentum: float = 0,
        nesterov: bool = False,
        weight_decay: float = 0,
        maximize: bool = False,
        dual_state: bool | None = None,
        anchor: str = "auto",
        rounding: str = "nearest",
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
        nonfinite: str | None = None,
    ):
        defaults = {
            "lr": lr,
            "mirror_map": Euclidean() if mirror_map is None else mirror_map,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "dual_state": dual_state,
            "anchor": anchor,
            "rounding": rounding,
            "foreach": foreach,
            "fused": fused,
            "differentiable": differentiable,
            "nonfinite": nonfinite,
        }
        check_options(defaults)
        self._written = Written()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, with options and a ``mirror_map`` of its own.

        A parameter that is repeated in the group is kept once.

        Raises:
            InputError: an option or a parameter is out of range. No group was added then.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        drop_repeated(group)
        try:
            check_group(group, self.defaults)
        except BaseException:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], _Loss]) -> _Loss: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step.

        Args:
            closure: evaluates the loss and its gradients, with gradients enabled.

        Returns:
            The loss that ``closure`` returned, or None.

        Raises:
            InputError: a gradient is sparse, a parameter has changed its shape, weight decay would
                leave the map's domain, ``differentiable`` meets a leaf tensor, or the first step
                is captured in a CUDA graph.
            FloatingPointError, NewtonError: a result is not finite; see ``nonfinite``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Not torch's own decorator, whose deliberate graph breaks forbid compiling with fullgraph.
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step_without_autocast()
        return loss

    def _step_without_autocast(self) -> None:
        # Autocast would compute the products of a map in half precision.
        kinds = autocast_devices(p for group in self.param_groups for p in group["params"])
        if not kinds:
            return self._step()
        with torch.autocast(kinds[0], enabled=False):
            return self._step_without_autocast()

    def _step(self) -> None:
        if torch.compiler.is_compiling():
            # Traced, the shards do not end where they do eagerly.
            if any(is_sharded(p) for group in self.param_groups for p in group["params"]):
                self._step_outside_graphs()
            else:
                take(self, self._collect, None)
            return
        self._states = States(self.state)
        taken = None
        try:
            taken = take(self, self._collect, self._states)
        except BaseException:
            # GradScaler removes what it has set only after a step that returns.
            vars(self).pop("grad_scale", None)
            vars(self).pop("found_inf", None)
            raise
        finally:
            if taken is None:
                self._states.undo()
            del self._states
        for lists in taken or []:
            self._written.record(lists)

    @untraced
    def _step_outside_graphs(self) -> None:
        self._step()

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # GradScaler asks: where this is true it sets grad_scale and found_inf around a step instead
        # of unscaling the gradients, in a pass of its own, and reading found_inf back.
        return any(map(may_fuse_scaled, self.param_groups))

    def _init_group(self, *lists: Any) -> None:
        # torch.compile knows this name from torch's own optimizers: it calls the method once,
        # outside the graph, and takes the tensors from the lists.
        if torch.compiler.is_compiling() or not hasattr(self, "_states"):
            States(self.state).init_group(Lists(*lists))
        else:
            self._states.init_group(Lists(*lists), *self._written.changed(lists[0]))

    def _collect(self, group: Group) -> Lists:
        lists = Lists(group, [], [], [], [], [], [], [])
        self._init_group(*lists)
        return lists

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, each ``mirror_map`` as its name, options and tensors.

        It holds tensors and plain values only: ``torch.load(..., weights_only=True)`` reads it.
        """
        handle = self.register_state_dict_post_hook(pack_maps, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` gave; the tensors of the maps are copied into the maps.

        State moves to the device of its parameter, and beside a dual state it stays in at least
        float32 whatever the dtype of the parameter.

        Raises:
            InputError: the checkpoint is of another mirror map, of another model, of a newer
                version of this package, or damaged. Nothing has changed then.
        """
        checked(state_dict, "state dict", dict)  # the user's own hooks may expect as much
        # The base class casts all state to the dtype of the parameter: hide it, after the user's
        # own hooks have run. __setstate__ uncovers it, before the user's post-hooks run.
        handle = self.register_load_state_dict_pre_hook(hide_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by pickle and deep copies with everything, by load_state_dict without defaults.
        self._written = Written(doubtful=True)
        loading = "defaults" not in state
        defaults = self.defaults if loading else state["defaults"]
        defaults.setdefault("differentiable", False)
        defaults.setdefault("nonfinite", None)
        for group in state["param_groups"]:
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("dual_state", None)
            group.setdefault("anchor", "auto")
            group.setdefault("rounding", "nearest")
            group.setdefault("foreach", None)
            group.setdefault("fused", None)
            for name in RUN_OPTIONS:
                group[name] = defaults[name]
        if loading:
            adopt(self.param_groups, state["param_groups"], state["state"])
        super().__setstate__(state)
