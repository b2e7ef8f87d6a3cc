"""Training problems for ``bench/training.py``: what is minimised, and how success is measured."""

import hashlib
import itertools
import math
import os
import re
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirror_opt.fewshot.images import list_images, read_images


class Problem(NamedTuple):
    """One instance, made from a seed.

    Attributes:
        params: what is trained, at its start.
        loss: the training loss at a step, differentiable.
        metric: what is reported, lower is better.
        model: ``(model, loss_fn, sample)`` where a map can be meta-learned on short runs:
            ``sample(generator)`` draws a batch ``(x, y)``. None where it cannot.
    """

    params: list[Tensor]
    loss: Callable[[int], Tensor]
    metric: Callable[[], float]
    model: tuple[nn.Module, Callable, Callable] | None = None


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse_recovery(seed: int) -> Problem:
    """Least squares with 100 equations and 1000 unknowns, 10 of them not zero.

    Many w fit the equations; which one is found is a matter of the geometry. Metric: |w - truth| /
    |truth|.
    """
    g = _generator(seed)
    x = torch.randn(100, 1000, generator=g) / 10
    truth = torch.zeros(1000)
    truth[torch.randperm(1000, generator=g)[:10]] = torch.randn(10, generator=g)
    y, w = x @ truth, nn.Parameter(torch.zeros(1000))
    return Problem(
        [w],
        lambda step: (x @ w - y).square().sum() / 2,
        lambda: float((w.detach() - truth).norm() / truth.norm()),
    )


def experts(seed: int) -> Problem:
    """Combine 10000 experts, of whom 10 matter, from a stream of single noisy observations.

    y = <x, truth> + noise with x in {-1, 1}^d: the squared loss has gradients that are small in
    the maximum norm and large in the Euclidean one. Metric: |w - truth|^2, the excess risk.
    """
    g = _generator(seed)
    truth = torch.zeros(10_000)
    truth[torch.randperm(10_000, generator=g)[:10]] = 0.1
    weights = nn.Parameter(torch.full((10_000,), 1e-4))

    def loss(step: int) -> Tensor:
        g = _generator(10_000 * seed + step + 1)
        x = torch.randint(2, (10_000,), generator=g) * 2.0 - 1
        y = x @ truth + 0.1 * torch.randn((), generator=g)
        return (x @ weights - y).square() / 2

    return Problem([weights], loss, lambda: float((weights.detach() - truth).square().sum()))


def project_to_simplex(w: Tensor) -> Tensor:
    """The nearest point of the simplex (Duchi et al. 2008)."""
    ordered = w.sort(descending=True).values
    excess = ordered.cumsum(0) - 1
    count = torch.arange(1, len(w) + 1)
    rank = int((ordered * count > excess).nonzero()[-1])
    return (w - excess[rank] / (rank + 1)).clamp(min=0)


@cache
def _sources() -> dict[str, list[str]]:
    """Source text by top-level package, of Python's own standard library: the larger packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {}
    for path in sorted(root.glob("*/**/*.py")):
        package = path.relative_to(root).parts[0]
        if package in ("site-packages", "test", "pydoc_data", "encodings") or "test" in path.name:
            continue
        found.setdefault(package, []).append(path.read_text("utf-8", errors="replace"))
    large = sorted(found, key=lambda p: -sum(map(len, found[p])))[:10]
    return {package: found[package] for package in sorted(large)}


_FEATURES, _TOKENS = 100_000, 60


@cache
def _documents() -> tuple[Tensor, Tensor]:
    """Five lines of source each, as hashed tokens and pairs of tokens ``(n, _TOKENS)``; labels."""
    rows, labels = [], []
    for label, texts in enumerate(_sources().values()):
        for text in texts:
            lines = [line for line in text.splitlines() if line.strip()]
            for i in range(0, len(lines) - 4, 5):
                tokens = re.findall(r"\w+|[^\w\s]", " ".join(lines[i : i + 5]))
                grams = [*tokens, *(a + " " + b for a, b in itertools.pairwise(tokens))]
                hashed = [
                    int.from_bytes(hashlib.md5(t.encode()).digest()[:4], "big") % (_FEATURES - 1)
                    + 1
                    for t in grams[:_TOKENS]
                ]
                rows.append(hashed + [0] * (_TOKENS - len(hashed)))  # 0: nothing
                labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


class _BagOfTokens(nn.Module):
    """Linear in the counts of the tokens, from zero."""

    def __init__(self, classes: int):
        super().__init__()
        self.embedding = nn.Embedding(_FEATURES, classes, padding_idx=0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.embedding.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.embedding(x).sum(-2)  # EmbeddingBag has no second derivative


def logistic(seed: int) -> Problem:
    """Which package five lines of Python come from: logistic regression with 1e5 features.

    Metric: the loss on a tenth of the documents, held out.
    """
    x, y = _documents()
    order = torch.randperm(len(x), generator=_generator(seed))
    held, rest = order[: len(x) // 10], order[len(x) // 10 :]
    model = _BagOfTokens(int(y.max()) + 1)

    def sample(g: torch.Generator, size: int = 128) -> tuple[Tensor, Tensor]:
        at = rest[torch.randint(len(rest), (size,), generator=g)]
        return x[at], y[at]

    def loss(step: int) -> Tensor:
        at, label = sample(_generator(1000 * seed + step))
        return F.cross_entropy(model(at), label)

    def metric() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(x[held]), y[held]))

    return Problem(list(model.parameters()), loss, metric, (model, F.cross_entropy, sample))


class _Transformer(nn.Module):
    """A causal language model over bytes."""

    def __init__(self, width: int = 64, layers: int = 2, context: int = 64):
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        mask = torch.full((context, context), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bytes(x) + self.places.weight[: x.shape[-1]]
        for block in self.blocks:
            q, k, v = (
                z.unflatten(-1, (4, -1)).transpose(-2, -3)
                for z in block["qkv"](block["norm"](h)).chunk(3, -1)
            )
            # By hand: the fused attention has no second derivative.
            a = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + self.mask, -1) @ v
            h = h + block["out"](a.transpose(-2, -3).flatten(-2))
            h = h + block["down"](F.gelu(block["up"](block["norm2"](h))))
        return self.head(self.norm(h))


def language_model(seed: int) -> Problem:
    """A transformer of two layers over the bytes of Python's standard library.

    Metric: the loss on text held out, in nats a byte.
    """
    texts = [t.encode() for texts in _sources().values() for t in texts]
    order = torch.randperm(len(texts), generator=_generator(0)).tolist()
    cut = len(texts) // 10
    held, rest = (
        torch.frombuffer(bytearray(b"".join(texts[i] for i in part)), dtype=torch.uint8).long()
        for part in (order[:cut], order[cut:])
    )
    torch.manual_seed(seed)
    model = _Transformer()

    def windows(text: Tensor, g: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        at = torch.randint(len(text) - 65, (size, 1), generator=g) + torch.arange(65)
        return text[at][:, :-1], text[at][:, 1:]

    def sample(g: torch.Generator, size: int = 16) -> tuple[Tensor, Tensor]:
        return windows(rest, g, size)

    def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def loss(step: int) -> Tensor:
        x, y = sample(_generator(1000 * seed + step))
        return cross_entropy(model(x), y)

    def metric() -> float:
        x, y = windows(held, _generator(0), 128)
        with torch.no_grad():
            return float(cross_entropy(model(x), y))

    return Problem(list(model.parameters()), loss, metric, (model, cross_entropy, sample))


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.skip = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(h + self.skip(x))


@cache
def _images() -> tuple[Tensor, Tensor]:
    """The 64 training classes of CIFAR-FS: uint8 ``(n, 3, 32, 32)``, and labels."""
    root = os.environ.get("MIRROR_OPT_DATA")
    if not root:
        raise SystemExit("resnet: set MIRROR_OPT_DATA to the folder that holds cifar-fs/")
    files = list_images(Path(root) / "cifar-fs")
    names = sorted(n for n in files if n.split("/")[0].removesuffix(".zip") == "train")
    classes = sorted({n.split("/")[-2] for n in names})
    labels = torch.tensor([classes.index(n.split("/")[-2]) for n in names])
    return torch.tensor(read_images([files[n] for n in names], 32, 3)), labels


def resnet(seed: int) -> Problem:
    """A small residual network on the 64 training classes of CIFAR-FS.

    Metric: the loss on 2000 images held out, with the statistics of each batch.
    """
    images, labels = _images()
    order = torch.randperm(len(images), generator=_generator(0))
    held, rest = order[:2000], order[2000:]
    torch.manual_seed(seed)
    blocks = [_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2)]
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 64))

    def batch(at: Tensor) -> tuple[Tensor, Tensor]:
        return images[at].float() / 255 - 0.5, labels[at]

    def sample(g: torch.Generator, size: int = 64) -> tuple[Tensor, Tensor]:
        return batch(rest[torch.randint(len(rest), (size,), generator=g)])

    def loss(step: int) -> Tensor:
        x, y = sample(_generator(1000 * seed + step))
        return F.cross_entropy(model(x), y)

    def metric() -> float:
        with torch.no_grad():
            losses = [F.cross_entropy(model(x), y) for x, y in map(batch, held.split(500))]
        return float(torch.stack(losses).mean())

    return Problem(list(model.parameters()), loss, metric, (model, F.cross_entropy, sample))
