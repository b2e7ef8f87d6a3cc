"""Training: what a run writes, that the same seed gives the same, and going on after a stop."""

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from uuid import uuid4

import pytest
import torch
from runs_cases import InterruptedFamily, handled_by

from mirror_opt import fewshot, meta
from mirror_opt.cli import main
from mirror_opt.errors import InputError
from mirror_opt.runs import RunConfig, checkpoint, evaluate, results, train
from mirror_opt.runs.config import build
from mirror_opt.runs.train import decay, horizon, open_run

TINY = {
    "shots": 4,
    "queries": 4,
    "iterations": 8,
    "tasks_per_batch": 2,
    "train_steps": "1-3",
    "adapt_steps": "0,1",
    "test_tasks": 4,
}
ARGUMENTS = [
    part for name, value in TINY.items() for part in ("--" + name.replace("_", "-"), str(value))
]


def tiny(method="mirror", **changes):
    return RunConfig.create("sinusoid", method, **TINY | changes)


def final(out):
    """What two runs that are the same have in common, bit for bit."""
    state = checkpoint.load(out / "checkpoint.pt")
    rows = results.read(out / "results.json")
    for row in rows:
        del row["seconds"], row["date"]
    optimizer = state["optimizer"]
    return state["learner"], optimizer["state"], optimizer["param_groups"], state["losses"], rows


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny(), out)
    return out


def test_a_run_directory(whole):
    config = json.loads((whole / "config.json").read_text())
    assert RunConfig.from_dict(config, "config.json") == tiny()
    history = json.loads((whole / "history.json").read_text())
    assert len(history["loss"]) == 8
    assert history["skipped"] == 0
    assert min(history["loss"]) > 0
    rows = json.loads((whole / "results.json").read_text())
    assert [row["adapt_steps"] for row in rows] == [0, 1]
    for row in rows:
        assert tuple(row) == tuple(results.ROW)
        assert row["method"] == "mirror"
        assert row["map"] == "kronecker"
        assert row["train_steps"] == "1-3"
        assert row["iterations"] == 8
        assert row["ways"] is None
        assert row["seconds"] > 0


def test_rows_are_the_metric_on_test_tasks(whole):
    config = tiny()
    task, learner = build(config)
    learner.load_state_dict(checkpoint.load(whole / "checkpoint.pt")["learner"])
    batch = task.sample("test", 0, 4)
    for row in results.read(whole / "results.json"):
        errors = torch.stack(
            [
                task.metric_fn(
                    learner.adapt(task.loss_fn, sx, sy, steps=row["adapt_steps"])(qx), qy
                ).detach()
                for sx, sy, qx, qy in zip(*batch, strict=True)
            ]
        ).double()
        assert row["mean"] == pytest.approx(errors.mean().item(), rel=1e-5)
        assert row["ci95"] == pytest.approx(1.96 * errors.std().item() / 2, rel=1e-4)


def test_training_moves_every_group_and_calibrates(whole):
    _, fresh = build(tiny())
    before = fresh.state_dict()
    after = checkpoint.load(whole / "checkpoint.pt")["learner"]
    for part in ("model.", "mirror_map."):
        assert any(not torch.equal(before[k], after[k]) for k in before if k.startswith(part))
    units = [k for k in after if k.endswith(".unit")]
    assert units
    assert all((after[k] != 1).any() for k in units)


def test_more_training_is_better(tmp_path):
    losses = []
    for iterations in (1, 60):
        rows = train(
            tiny(
                "maml",
                iterations=iterations,
                train_steps=3,
                adapt_steps="3",
                test_tasks=50,
                shots=10,
                queries=10,
                lr=0.05,
                init_lr=1e-2,
            ),
            tmp_path / str(iterations),
        )
        losses.append(rows[0]["mean"])
    assert losses[1] < 0.9 * losses[0]


def test_the_same_seed_gives_the_same_and_another_does_not(whole, tmp_path):
    before = torch.get_rng_state()
    train(tiny(), tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), before)
    train(tiny(seed=1), tmp_path / "other")
    assert same(final(whole), final(tmp_path / "again"))
    assert not same(final(whole)[0], final(tmp_path / "other")[0])


def test_all_methods_start_at_the_same_model():
    models = [build(tiny(method))[1].model.state_dict() for method in meta.METHODS]
    assert all(same(dict(models[0]), dict(model)) for model in models[1:])


@pytest.mark.parametrize(
    ("at", "number"),
    [(1, signal.SIGINT), (5, signal.SIGINT), (7, signal.SIGINT), (3, signal.SIGTERM)],
)
def test_interrupted_and_resumed_is_the_same(whole, tmp_path, monkeypatch, capsys, at, number):
    out = tmp_path / "run"
    command = ["train", "--task", "sinusoid", *ARGUMENTS, "--out", str(out)]
    interrupt = partial(signal.raise_signal, number)
    with monkeypatch.context() as patch:
        make = fewshot.make_task
        patch.setattr(
            fewshot, "make_task", lambda *a, **k: InterruptedFamily(make(*a, **k), at, interrupt)
        )
        with handled_by(signal.default_int_handler, number):
            assert main(command) == 130
            assert signal.getsignal(number) is signal.default_int_handler
    printed = capsys.readouterr()
    assert printed.err.strip().splitlines()[-1] == (
        f"mirror-opt: interrupted; go on with: mirror-opt train --out {out} --resume"
    )
    assert checkpoint.load(out / "checkpoint.pt")["iteration"] == at + 1
    assert not (out / "results.json").exists()
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert same(final(whole), final(out))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_is_ignored_stays_so(whole, tmp_path, monkeypatch, number):
    interrupt = partial(signal.raise_signal, number)
    make = fewshot.make_task
    monkeypatch.setattr(
        fewshot, "make_task", lambda *a, **k: InterruptedFamily(make(*a, **k), 3, interrupt)
    )
    with handled_by(signal.SIG_IGN, number):
        train(tiny(), tmp_path)
        assert signal.getsignal(number) is signal.SIG_IGN
    assert same(final(whole), final(tmp_path))


def test_killed_and_resumed_is_the_same(tmp_path):
    arguments = ["--task", "sinusoid", *ARGUMENTS, "--iterations", "30", "--save-every", "0"]
    assert main(["train", *arguments, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "mirror_opt.cli", "train", *arguments, "--out", str(out)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (out / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    done = checkpoint.load(out / "checkpoint.pt")["iteration"]
    assert 1 <= done < 30
    assert main(["train", *arguments, "--out", str(out), "--resume"]) == 0
    assert same(final(tmp_path / "whole"), final(out))


def test_killed_before_the_first_checkpoint(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_bytes((whole / "config.json").read_bytes())
    half = out / f".checkpoint.pt.{uuid4().hex}"
    half.write_bytes(b"half")
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert same(final(whole), final(out))
    assert not half.exists()


def test_resuming_a_finished_run_changes_nothing(whole):
    rows = (whole / "results.json").read_bytes()
    saved = (whole / "checkpoint.pt").stat().st_mtime_ns
    assert main(["train", "--out", str(whole), "--resume"]) == 0
    assert (whole / "results.json").read_bytes() == rows
    assert (whole / "checkpoint.pt").stat().st_mtime_ns == saved


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"lr": 0.5}, "--lr 0.5"),
        ({"train_steps": "2"}, "--train-steps 2"),
        ({"iterations": 9}, "--iterations 9"),
        ({"map_options": "terms=7"}, "--map-options terms=7"),
        ({"method": "maml"}, "--method maml"),
        ({"task": "glyphs"}, "--task glyphs"),
    ],
)
def test_resuming_with_a_changed_option_names_it(whole, changed, option):
    with pytest.raises(InputError, match=option):
        open_run(whole, changed, resume=True)


def test_resuming_with_the_same_options_is_fine(whole):
    assert open_run(whole, {"task": "sinusoid", **TINY}, resume=True) == tiny()


def test_nothing_to_resume(tmp_path, caplog):
    assert open_run(tmp_path, {"task": "sinusoid", **TINY}, resume=True) == tiny()
    assert f"{tmp_path}: no run to go on with" in caplog.text


def test_results_do_not_outlive_their_checkpoint(whole, tmp_path):
    out = tmp_path / "run"
    train(tiny(seed=1), out)
    (out / "checkpoint.pt").unlink()
    train(tiny(), out)
    assert same(final(out), final(whole))


def test_non_finite_meta_gradients_are_left_out_and_counted(tmp_path, monkeypatch, caplog):
    original = meta.MetaLearner.meta_loss

    def spoiled(self, *arguments, steps):
        loss = original(self, *arguments, steps=steps)
        spoiled.calls += 1
        if spoiled.calls == 2:
            raise meta.NonFiniteLossError(0, 1)
        return loss * float("nan") if spoiled.calls == 4 else loss

    spoiled.calls = 0
    monkeypatch.setattr(meta.MetaLearner, "meta_loss", spoiled)
    train(tiny(), tmp_path)
    history = json.loads((tmp_path / "history.json").read_text())
    assert [loss is None for loss in history["loss"]] == [i in (1, 3) for i in range(8)]
    assert history["skipped"] == 2
    assert "mirror (kronecker): 2 of 8 iterations were left out" in caplog.text
    assert "the outer rates are at" in caplog.text
    assert "was learned" not in caplog.text
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    assert all(torch.isfinite(x).all() for x in state["learner"].values())
    # A single bad batch leads to no earlier state: the six other steps count.
    assert {float(s["step"]) for s in state["optimizer"]["state"].values()} == {6.0}


def test_a_diverging_run_reports_null(tmp_path, caplog):
    rows = train(tiny("maml", lr=1e30, guard="off"), tmp_path)
    assert rows[0]["mean"] is not None  # no step, no divergence
    assert rows[1]["mean"] is None
    assert json.loads((tmp_path / "history.json").read_text())["skipped"] == 8
    assert caplog.text.strip().endswith(
        "nothing was learned: lower --lr, the inner step size, or --init-lr and --map-lr"
    )


def test_a_full_disk(tmp_path):
    out = tmp_path / "run"

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # the checkpoint is larger

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mirror_opt.cli",
            "train",
            "--task",
            "sinusoid",
            *ARGUMENTS,
            "--out",
            str(out),
        ],
        preexec_fn=limit,
        # Measuring coverage writes files of its own.
        env={k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"mirror-opt: error: {out / 'checkpoint.pt'}: File too large")
    assert line.endswith(f"free some space, then go on with: mirror-opt train --out {out} --resume")
    assert os.listdir(out) == ["config.json"]


def test_decay_is_constant_and_then_linear_to_a_twentieth():
    factors = [decay(i, 101) for i in range(101)]
    assert factors[:76] == [1.0] * 76
    drops = [a - b for a, b in itertools.pairwise(factors[75:])]
    assert drops == pytest.approx([0.95 / 25] * 25)
    assert factors[-1] == pytest.approx(0.05)
    assert decay(0, 1) == 1.0


def test_horizon_is_uniform_and_pure():
    drawn = [horizon(3, i, (1, 5)) for i in range(1000)]
    assert drawn == [horizon(3, i, (1, 5)) for i in range(1000)]
    counts = [drawn.count(k) for k in range(1, 6)]
    assert sum(counts) == 1000
    assert min(counts) > 150
    assert [horizon(0, i, (4, 4)) for i in range(5)] == [4] * 5


def test_evaluate_is_the_same_for_any_meta_batch_and_has_a_validation_split():
    task, learner = build(tiny("maml"))
    test = evaluate(learner, task, tiny("maml", test_tasks=30))
    assert test[0].shape == (30,)
    assert same(test, evaluate(learner, task, tiny("maml", test_tasks=30, tasks_per_batch=7)))
    val = evaluate(learner, task, tiny("maml", test_tasks=30), split="val")
    assert not torch.equal(test[0], val[0])
