"""The interface of every mirror map."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mirror_opt.dtypes import at_least_float32
from mirror_opt.errors import InputError

__all__ = ["MirrorMap", "OwningMap", "Profile", "dot"]

Tensors = Sequence[Tensor | None]


class Profile(NamedTuple):
    """One curve of a learned map, for a plot: psi against the identity, in units of the map.

    Attributes:
        tensor: index of the tensor.
        channel: index of the curve among those of the tensor.
        x, y: ``(n,)``, the argument and the value.
    """

    tensor: int
    channel: int
    x: Tensor
    y: Tensor


class _Batch(NamedTuple):
    """Tensors that are worked on at once."""

    indices: Sequence[int]  # their places in the sequence
    x: Tensor
    coefficient: Any


def dot(xs: Tensors, ys: Tensors) -> Tensor:
    """The inner product of two sequences of tensors; pairs with a None count nothing.

    In float32 for tensors of half precision, whose products leave their range.
    """
    pairs = [(x, y) for x, y in zip(xs, ys, strict=True) if x is not None and y is not None]
    terms = [(x.to(at_least_float32(x.dtype)) * y).sum() for x, y in pairs]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def _check_is_sequence(xs: Tensors) -> None:
    if isinstance(xs, Tensor):  # whose rows would be taken for tensors
        raise InputError("a map got one tensor: pass a sequence, such as [weight]")


def _at_least_float32(xs: Tensors) -> Tensors:
    _check_is_sequence(xs)
    return [None if x is None else x.to(at_least_float32(x.dtype)) for x in xs]


def _shape(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.shape)


class MirrorMap(nn.Module):
    r"""The gradient of a distance-generating function (DGF) h over a sequence of tensors.

    ``forward`` is the mirror map grad h, ``inverse`` its inverse grad h*, the gradient of the
    convex conjugate. One mirror step is ``inverse(forward(x) - lr * gradient)`` (Nemirovski and
    Yudin 1983; Beck and Teboulle 2003).

    All methods take a sequence of tensors, one for each parameter; h is a sum over them, and
    entries that are None (no gradient) pass through as None. ``coefficients()`` holds what depends
    on the map's own parameters alone: compute it once and hand it to many calls.

    Subclasses implement, for one tensor and its coefficients, ``_gradient``,
    ``_gradient_conjugate`` and ``_potential`` or ``_conjugate``.

    Attributes:
        name: the name in the registry; that of the class where it is not registered.
        summary: one line for listings.
        is_dgf: False for a transform of the gradient that is no gradient of a convex function.
        owns_tensors: True when the constructor takes the parameters first.
        anchored: True when the map acts on the displacement phi - phi_0 from an anchor phi_0 (the
            initial parameters), which the caller subtracts; False when it acts on phi.
        entrywise: True when grad h takes every entry by itself, with one function for all and, if
            the map has coefficients, a coefficient for each entry in a tensor of the parameter's
            shape. A step may then take the entries in any blocks.
        domain: where x may lie: ``"reals"``, ``"positive"`` or ``"simplex"``.
        forward_is_closed, inverse_is_closed: False where a Newton solve is needed.
        inverse_is_batchable: False where ``inverse`` runs a solve that ``vmap`` cannot batch.
        variants: constructor options that together reach every path; tests run all of them.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    is_dgf: ClassVar[bool] = True
    owns_tensors: ClassVar[bool] = False
    anchored: ClassVar[bool] = False
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    entrywise: bool = False
    domain: str = "reals"
    forward_is_closed: bool = True
    inverse_is_closed: bool = True
    inverse_is_batchable: bool = True

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        # Until it is registered: its checkpoints are not those of the map that it derives from.
        cls.name, cls.summary = cls.__qualname__, ""

    # The mathematics, tensor by tensor.

    def coefficients(self) -> Sequence[Any] | None:
        """What the map computes from its own parameters, one entry a tensor; None if nothing."""
        return None

    def _gradient(self, x: Tensor, coefficient: Any) -> Tensor:
        raise NotImplementedError

    def _gradient_conjugate(self, z: Tensor, coefficient: Any) -> Tensor:
        raise NotImplementedError

    def _potential(self, x: Tensor, coefficient: Any) -> Tensor:
        # Fenchel's equality: h(x) + h*(z) = <z, x> at z = grad h(x).
        if type(self)._conjugate is MirrorMap._conjugate:
            raise NotImplementedError(f"{type(self).__name__} has no _potential and no _conjugate")
        z = self._gradient(x, coefficient)
        return (z * x).sum() - self._conjugate(z, coefficient)

    def _conjugate(self, z: Tensor, coefficient: Any) -> Tensor:
        x = self._gradient_conjugate(z, coefficient)
        return (z * x).sum() - self._potential(x, coefficient)

    # The interface.

    def forward(self, xs: Tensors, coefficients: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """The mirror map z = grad h(x): a tuple of tensors shaped as ``xs``.

        Args:
            xs: one floating tensor for each that the map was built for, None where there is none.
            coefficients: what ``coefficients()`` gave, where it is at hand.

        Raises:
            InputError: the tensors are not of the number, the shapes and the dtypes that the map
                was built for.
            NewtonError: where ``forward_is_closed`` is False, as for ``inverse``.
        """
        return self._each(self._gradient, xs, coefficients)

    def inverse(self, zs: Tensors, coefficients: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """The inverse mirror map x = grad h*(z): a tuple of tensors shaped as ``zs``.

        Args:
            zs, coefficients: as for ``forward``.

        Raises:
            InputError: as ``forward``.
            NewtonError: where ``inverse_is_closed`` is False: the solve did not converge, or
                ``zs`` holds NaN or Inf.
        """
        return self._each(self._gradient_conjugate, zs, coefficients)

    def potential(self, xs: Tensors) -> Tensor:
        """h(x), a 0-dim tensor of at least float32; raises as ``forward``."""
        return self._total(self._potential, xs)

    def conjugate(self, zs: Tensors) -> Tensor:
        """The convex conjugate h*(z), a 0-dim tensor of at least float32; raises as ``inverse``."""
        return self._total(self._conjugate, zs)

    def bregman(self, xs: Tensors, ys: Tensors) -> Tensor:
        """``D_h(x, y) = h(x) - h(y) - <grad h(y), x - y> >= 0``, as ``potential``.

        Raises:
            InputError: as ``forward``, or the points are not of one shape.
        """
        self._check_count(ys, len(xs))
        for i, shapes in enumerate(zip(map(_shape, xs), map(_shape, ys), strict=True)):
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"tensor {i} of x has shape {shapes[0]} and that of y {shapes[1]}: pass two "
                    "points of one shape, None in both where there is no tensor"
                )
        # Differences of large numbers, for which half precision is too coarse.
        xs, ys = _at_least_float32(xs), _at_least_float32(ys)
        step = [None if x is None or y is None else x - y for x, y in zip(xs, ys, strict=True)]
        return self.potential(xs) - self.potential(ys) - dot(self.forward(ys), step)

    def strong_convexity(self) -> Tensor:
        """mu > 0 with D_h(x, y) >= mu/2 |x - y|^2 on the domain; 0 when there is none."""
        raise NotImplementedError

    def smoothness(self) -> Tensor:
        """ell with D_h(x, y) <= ell/2 |x - y|^2 on the domain; inf when there is none."""
        raise NotImplementedError

    def calibrate(self, displacements: Sequence[Tensors]) -> None:
        """Sets the scale of the nonlinearity from sample displacements, -lr * gradient.

        Args:
            displacements: a list over samples of lists over tensors. Maps without a scale ignore
                them; samples that are all zero or not finite are ignored.

        Raises:
            InputError: they are not of the shapes that the map was built for.
        """

    def profiles(self) -> list[Profile]:
        """Curves that show what was learned; empty for maps that learn no curve."""
        return []

    def coupled(self, dims: int) -> tuple[int, ...]:
        """The dimensions of a tensor, of ``dims`` in all, along which the map couples entries.

        A process that holds a shard of a tensor needs these dimensions whole.
        """
        return ()

    # Input.

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises InputError unless the map serves these parameters.

        Their number, shapes and dtypes for a map with parameters of its own, and the domain.
        """
        self.check_domain(params)

    def check_domain(self, params: Sequence[Tensor]) -> None:
        """Raises InputError unless these parameters lie in the domain."""
        # Zero is let in: steps reach it by underflow, and a resumed run must be able to start
        # there.
        if self.domain == "reals":
            return  # whatever the values, and where there are none yet
        inside = self._on_simplex if self.domain == "simplex" else self._is_positive
        for i, p in enumerate(params):
            if p.numel() and not p.is_meta and not inside(p.detach()):
                raise InputError(
                    f"parameter {i} of shape {tuple(p.shape)} is not in the domain of "
                    f"{type(self).__name__} ({self.domain}): give it positive entries"
                    + (" that sum to 1 along the last dimension" * (self.domain == "simplex"))
                )

    @staticmethod
    def _is_positive(p: Tensor) -> bool:
        return bool((p >= 0).all())

    @classmethod
    def _on_simplex(cls, p: Tensor) -> bool:
        total = p.double().sum(-1)
        return cls._is_positive(p) and bool(((total - 1).abs() < 1e-2).all())

    # Over the tensors.

    def _batches(self, xs: Tensors, coefficients: Sequence[Any] | None) -> list[_Batch]:
        """The tensors that are there, with what belongs to them: here one at a time."""
        coefficients = self.coefficients() if coefficients is None else coefficients
        _check_is_sequence(xs)
        if coefficients is None:
            coefficients = [None] * len(xs)
        self._check_count(xs, len(coefficients))
        xs = self._widened(xs)
        pairs = zip(xs, coefficients, strict=True)
        return [_Batch([i], x, c) for i, (x, c) in enumerate(pairs) if x is not None]

    def _widened(self, xs: Tensors) -> Tensors:
        """The tensors in a dtype that the map computes in."""
        return xs

    def _check_count(self, xs: Tensors, count: int) -> None:
        if len(xs) != count:
            raise InputError(
                f"{type(self).__name__} was built for {count} tensors and got {len(xs)}: pass one "
                "entry for each, None where there is no gradient"
            )

    def _each(
        self,
        function: Callable[[Tensor, Any], Tensor],
        xs: Tensors,
        coefficients: Sequence[Any] | None,
    ) -> tuple[Tensor | None, ...]:
        results: list[Tensor | None] = [None] * len(xs)
        for batch in self._batches(xs, coefficients):
            results[batch.indices[0]] = function(batch.x, batch.coefficient)
        return tuple(results)

    def _total(self, function: Callable[[Tensor, Any], Tensor], xs: Tensors) -> Tensor:
        batches = self._batches(_at_least_float32(xs), None)
        terms = [function(batch.x, batch.coefficient) for batch in batches]
        return torch.stack(terms).sum() if terms else torch.zeros(())


class OwningMap(MirrorMap):
    """A map with parameters of its own for each tensor; the constructor takes the tensors first.

    Those are float32 for tensors of half precision, and so is what the map then returns. For others
    they have the dtype of the tensor; ``.to`` converts the map where the tensors are converted.

    Subclasses also implement ``_own_dtype``.
    """

    owns_tensors = True

    def __init__(self, params: Iterable[Tensor]):
        super().__init__()
        params = self._listed(params)
        if not params:
            raise InputError(f"{type(self).__name__} got no parameters: pass a non-empty sequence")
        for i, p in enumerate(params):
            if isinstance(p, Tensor) and is_lazy(p):
                raise InputError(
                    f"parameter {i} of {type(self).__name__} is not initialised: pass a batch "
                    "through the model first"
                )
            if not isinstance(p, Tensor) or not p.is_floating_point():
                got = p.dtype if isinstance(p, Tensor) else type(p).__name__
                raise InputError(
                    f"parameter {i} of {type(self).__name__} is {got}: pass real floating tensors, "
                    "such as those of model.parameters()"
                )
        self.shapes = [tuple(p.shape) for p in params]

    @classmethod
    def _listed(cls, params: Iterable[Tensor]) -> list[Tensor]:
        """The tensors of an iterator, which is gone through once."""
        if isinstance(params, Tensor):  # whose rows could be gone through
            raise InputError(f"{cls.__name__} got one tensor: pass a sequence, such as [weight]")
        return list(params)

    def _widened(self, xs: Tensors) -> Tensors:
        return _at_least_float32(xs)

    def _own_dtype(self, coefficient: Any) -> torch.dtype:
        """The dtype of what the map computes from its own parameters for one tensor."""
        raise NotImplementedError

    def _check_dtype(self, index: int, x: Tensor, coefficient: Any) -> None:
        """Raises InputError unless this tensor, widened, fits the map's own parameters."""
        own = self._own_dtype(coefficient)
        if x.dtype != own:
            raise InputError(
                f"{type(self).__name__} computes tensor {index} in {x.dtype}, and its own "
                f"parameters are {own}: convert the map with .to({x.dtype}), or pass tensors of "
                "the dtype that it was built for"
            )

    def _check_shapes(self, xs: Tensors) -> None:
        """Raises InputError unless the tensors are shaped as those that the map was built for."""
        self._check_count(xs, len(self.shapes))
        for i, (x, shape) in enumerate(zip(xs, self.shapes, strict=True)):
            if x is not None and x.shape != shape:
                raise InputError(
                    f"tensor {i} has shape {tuple(x.shape)} and {type(self).__name__} was built "
                    f"for {shape}: pass the tensors in the order and the shapes of then"
                )

    def _batches(self, xs: Tensors, coefficients: Sequence[Any] | None) -> list[_Batch]:
        if coefficients is None:  # else they may be of a part of each tensor
            self._check_shapes(xs)
        batches = super()._batches(xs, coefficients)
        for (index,), x, coefficient in batches:
            self._check_dtype(index, x, coefficient)
        return batches

    def _samples(
        self, displacements: Sequence[Tensors], index: int, coefficient: Any
    ) -> list[Tensor]:
        """What there is of one tensor to calibrate on, widened."""
        for d in displacements:
            self._check_count(d, len(self.shapes))
        found = [self._widened([d[index]])[0] for d in displacements]
        samples = [x for x in found if x is not None]
        for x in samples:
            if x.shape != self.shapes[index]:
                raise InputError(
                    f"a displacement of tensor {index} has shape {tuple(x.shape)}: pass one of "
                    f"{self.shapes[index]}"
                )
            self._check_dtype(index, x, coefficient)
        return samples

    @torch.no_grad()
    def check(self, params: Sequence[Tensor]) -> None:
        shapes = [tuple(p.shape) for p in params]
        if shapes != self.shapes:
            raise InputError(
                f"{type(self).__name__} was built for tensors of shapes {self.shapes} and got "
                f"{shapes}: build it from the parameters that it is to serve"
            )
        super().check(params)
        # Their dtypes, as every call checks them.
        self._batches([torch.empty(p.shape, dtype=p.dtype, device="meta") for p in params], None)
