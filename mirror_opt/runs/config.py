r"""What defines a run: every option, its default and its check, and the objects they stand for."""

import contextlib
import dataclasses
import inspect
import os
import re
import reprlib
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mirror_opt import fewshot, maps, meta
from mirror_opt.errors import InputError
from mirror_opt.fewshot import TaskFamily
from mirror_opt.meta import MetaLearner
from mirror_opt.runs import options
from mirror_opt.runs.directory import MOST
from mirror_opt.runs.options import READERS, check_further, check_type, option, shown

__all__ = ["GUARDS", "RunConfig", "build", "stated_default"]

GUARDS: dict[str, str | bool] = {"auto": "auto", "on": True, "off": False}

_RATES = ("lr", "init_lr", "map_lr", "rate_lr")
_LARGEST_RATE = 1e30  # ten times it, Adam's first step, is a float32 still
# Of whole numbers the least and the most.
_BOUNDS = {
    "iterations": (1, MOST),
    "tasks_per_batch": (1, 10**6),  # each has a random generator, of about a kilobyte
    "test_tasks": (2, MOST),
    "ways": (2, MOST),
    "shots": (1, MOST),
    "queries": (1, MOST),
    "filters": (1, MOST),
    "seed": (0, MOST),
    "threads": (1, 1024),  # more, and the process may not get them
}
_PAIRS = ("map_options", "task_options")
# Parameters of a task that have a field of their own, or are no part of what a run is.
_FIELDS_OF_TASK = ("ways", "shots", "queries", "seed", "data_dir", "download")
_IMAGES = {
    "ways": 5,
    "shots": 1,
    "queries": 15,
    "filters": 32,
    "iterations": 1000,
    "tasks_per_batch": 4,
    "train_steps": 1,
    "test_tasks": 600,
}
_SINUSOID = {
    "ways": None,
    "shots": 10,
    "queries": 10,
    "filters": None,
    "iterations": 3000,
    "tasks_per_batch": 25,
    "train_steps": 5,
    "test_tasks": 500,
}


def stated_default(name: str) -> str:
    r"""The default of an option as help states it, that of sinusoid where it is another.

    Example:
        >>> stated_default("iterations"), stated_default("ways")
        ('1000; sinusoid: 3000', '5')
    """
    images, sinusoid = _IMAGES[name], _SINUSOID[name]
    return f"{images}" + f"; sinusoid: {sinusoid}" * (sinusoid not in (None, images))


@dataclass(frozen=True)
class RunConfig:
    r"""Everything that determines a run's result. Make one with :meth:`create`.

    ``train_steps`` is the number of inner steps trained through, ``"lo-hi"`` for a random one;
    ``lr`` is the inner step size alpha, of all steps or (``learn_lr``) where a learned one of each
    step starts; ``init_lr``, ``map_lr`` and ``rate_lr`` are the outer rates of the initialisation,
    the map and learned inner rates (0 where none are learned). Steps are kept in one spelling, and
    ``map_options`` and ``task_options`` in full, with the defaults of those that are not given.
    """

    task: str
    method: str
    ways: int | None
    shots: int
    queries: int
    filters: int | None
    iterations: int
    tasks_per_batch: int
    train_steps: int | str
    lr: float
    init_lr: float
    map_lr: float
    rate_lr: float
    test_tasks: int
    map: str | None = None
    map_options: dict[str, Any] = field(default_factory=dict)
    learn_lr: bool = False
    adapt_steps: tuple[int, ...] = (0, 1, 2, 3, 5, 10)
    guard: str = "auto"
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    data_dir: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, task: str = "", method: str = "mirror", **given: Any) -> "RunConfig":
        r"""The config of ``method`` on ``task``: what is given, and defaults for the rest.

        Text is read as on the command line: ``train_steps="1-5"``, ``adapt_steps="0,1,5"``,
        ``map_options="terms=4,units=4"``.

        Raises:
            InputError: no task, an unknown name, or a value that cannot be.

        Example:
            >>> config = RunConfig.create("sinusoid", "maml", train_steps="1-5")
            >>> config.train_steps, config.shots, config.adapt_steps
            ('1-5', 10, (0, 1, 2, 3, 5, 10))
        """
        if not task:
            raise InputError(f"--task: missing; choose from {', '.join(fewshot.TASKS)}")
        _choice("task", task, fewshot.TASKS)
        _choice("method", method, meta.METHODS)
        rates = meta.defaults(method, task)
        values: dict[str, Any] = {
            **(_SINUSOID if task == "sinusoid" else _IMAGES),
            **{name: getattr(rates, name) for name in _RATES},
            "map": "kronecker" if method == "mirror" else None,
        }
        if not given.get("learn_lr"):
            values["rate_lr"] = 0.0
        values |= given
        values["device"] = options.device(values.get("device", "auto"))
        if values.get("data_dir") is not None:
            values["data_dir"] = os.fspath(values["data_dir"])
        return cls(task=task, method=method, **values)

    def __post_init__(self) -> None:
        for name in ("train_steps", "adapt_steps", *_PAIRS):
            object.__setattr__(self, name, READERS[name](getattr(self, name)))
        for name, hint in typing.get_type_hints(RunConfig).items():
            value = getattr(self, name)
            check_type(f"{option(name)} {reprlib.repr(value)}", value, hint)
        _choice("task", self.task, fewshot.TASKS)
        _choice("method", self.method, meta.METHODS)
        _choice("guard", self.guard, GUARDS)
        if self.device == "auto":  # one that is named may be that of another machine
            object.__setattr__(self, "device", options.device(self.device))
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(
                    f"{option(name)} {value}: must be a whole number, from {least} to {most}"
                )
        for name in _RATES:
            value = getattr(self, name)
            if not 0 <= value <= _LARGEST_RATE:
                raise InputError(
                    f"{option(name)} {value}: must be a number from 0 to {_LARGEST_RATE:g}"
                )
        if self.lr == 0:
            raise InputError("--lr 0: adaptation would not move; pass a step size above 0")
        if self.rate_lr and not self.learn_lr:
            raise InputError(
                f"--rate-lr {self.rate_lr}: the inner rates are not learned; pass --learn-lr too"
            )
        family = fewshot.TASKS[self.task]
        taken = {*inspect.signature(family).parameters, *inspect.signature(family.model).parameters}
        for name in ("ways", "filters", "data_dir"):
            value = getattr(self, name)
            if value is not None and name not in taken:
                raise InputError(
                    f"{option(name)} {value}: task {self.task} has no option {name}; "
                    f"drop {option(name)}, or pass another --task"
                )
        if self.method == "mirror":
            _choice("map", self.map, maps.REGISTRY)
            if maps.REGISTRY[str(self.map)].domain != "reals":
                reals = [name for name, cls in maps.REGISTRY.items() if cls.domain == "reals"]
                raise InputError(
                    f"--map {self.map}: for positive parameters, with which no network of these "
                    f"tasks starts; choose from {', '.join(reals)}"
                )
        elif self.map is not None:
            raise InputError(self._no_map("map", self.map))
        # In full, so that a run outlives a change of the defaults.
        for name in _PAIRS:
            object.__setattr__(self, name, self._further(name, getattr(self, name)))

    def _further(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        r"""The pairs ``given`` as the option ``name``, checked, and the defaults of the others."""
        if name == "task_options":
            owner, function = f"task {self.task}", fewshot.TASKS[self.task]
            return check_further(name, given, function, owner, _FIELDS_OF_TASK)
        if self.map is not None:
            return check_further(name, given, maps.REGISTRY[self.map], f"map {self.map}")
        if given:
            raise InputError(self._no_map(name, given))
        return {}

    def _no_map(self, name: str, value: Any) -> str:
        return (
            f"{option(name)} {shown(value)}: --method {self.method} has its own geometry; "
            "pass it with --method mirror"
        )

    def to_dict(self) -> dict[str, Any]:
        r"""Plain values, for JSON and for checkpoints."""
        return dataclasses.asdict(self) | {"adapt_steps": list(self.adapt_steps)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str | os.PathLike) -> "RunConfig":
        r"""Reads :meth:`to_dict` back; ``source`` is the file that an error names.

        Raises:
            InputError: a field is missing, unknown or out of range.
        """
        remedy = "restore it or train again"
        if not isinstance(values, dict):
            raise InputError(f"{source}: holds {reprlib.repr(values)} for a config; {remedy}")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error} ({remedy})") from None
        except TypeError as error:
            raise InputError(f"{source}: not the config of a run ({error}); {remedy}") from None

    def check_same(self, given: dict[str, Any], where: str | os.PathLike) -> None:
        r"""Holds options given on resuming against this config, that of the run in ``where``.

        ``data_dir`` may differ: the same data can live elsewhere.

        Raises:
            InputError: names the first option that differs.
        """
        for name, text in given.items():
            value: Any = READERS[name](text) if name in READERS else text
            own: Any = getattr(self, name)
            if isinstance(own, dict):  # options are given in part
                self._further(name, value)
                own = {key: own[key] for key in value}
            if name != "data_dir" and value != own:
                raise InputError(
                    f"{option(name)} {shown(value)}: the run in {where} has "
                    f"{shown(own)}; drop {option(name)} to go on with it, or pass another --out"
                )

    @property
    def horizon(self) -> tuple[int, int]:
        r"""``train_steps`` as (least, most)."""
        steps = [int(part) for part in str(self.train_steps).split("-")]
        return steps[0], steps[-1]

    @property
    def label(self) -> str:
        r"""How tables and pictures call the method, the map included."""
        return f"{self.method} ({self.map})" if self.map else self.method


def build(config: RunConfig, *, download: bool = False) -> tuple[TaskFamily, MetaLearner]:
    r"""The task family and the learner that ``config`` describes, the learner on its device.

    The model is initialised from ``config.seed``, the same for all methods, and torch's global
    random state is left as it was. ``config.threads`` is set for the process.

    Raises:
        InputError: absent data, more ways than classes, a map that does not fit the model.
    """
    device = options.device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if download and "download" not in inspect.signature(fewshot.TASKS[config.task]).parameters:
        raise InputError(f"--download: task {config.task} has nothing to download; drop --download")
    with _spelled("task_options", config.task_options):
        task = fewshot.make_task(
            config.task,
            ways=config.ways,
            shots=config.shots,
            queries=config.queries,
            seed=config.seed,
            data_dir=config.data_dir,
            download=download,
            **config.task_options,
        )
    low, high = config.horizon
    with torch.random.fork_rng(devices=[]), _spelled("map_options", config.map_options):
        torch.manual_seed(config.seed)
        make_model: Callable[..., nn.Module] = task.model
        model = make_model() if config.filters is None else make_model(filters=config.filters)
        learner = meta.build(
            config.method,
            model,
            map_name=config.map,
            map_options=config.map_options,
            lr=config.lr,
            learn_lr=config.learn_lr,
            steps=low if low == high else (low, high),
        )
    return task, learner.to(device)


@contextlib.contextmanager
def _spelled(name: str, pairs: dict[str, Any]) -> Iterator[None]:
    r"""Has an error that begins with an argument's name begin with the option that gave it.

    Args:
        name: the option of the command line that has the pairs, as a field.
        pairs: the arguments by name that it gave.
    """
    try:
        yield
    except InputError as error:
        if found := re.match(r"(?:Invalid )?(\w+)(?:=| is )", str(error)):
            key, rest = found[1], str(error)[found.end() :]
            if key in pairs:
                raise InputError(f"{option(name)} {key}={rest}") from error
            if key == "ways":
                raise InputError(f"{option(key)} {rest}") from error
        raise


def _choice(name: str, value: Any, choices: Iterable[str]) -> None:
    if value not in choices:
        raise InputError(f"{option(name)} {value}: unknown; choose from {', '.join(choices)}")
