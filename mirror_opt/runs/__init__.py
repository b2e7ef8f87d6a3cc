"""Runs: meta-training, evaluation and comparison with everything kept in one directory."""

from mirror_opt.runs.compare import compare
from mirror_opt.runs.config import RunConfig
from mirror_opt.runs.evaluate import evaluate, evaluate_run
from mirror_opt.runs.train import train

__all__ = ["RunConfig", "compare", "evaluate", "evaluate_run", "train"]
