"""What the tests of sharded parameters run in every process of a group."""

import contextlib
import copy
import io

import pytest
import torch
from distributed_harness import check, close, give, mesh, pair, spread, square, step, values, whole
from optim_cases import CASES, learned, same, snapshot
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from mirror_opt import MirrorDescent, backends, maps
from mirror_opt.errors import InputError


@check
def what_every_process_holds_is_rounded_stochastically_alike(world, folder):
    ones = torch.ones(world + 1, 50, dtype=torch.bfloat16)  # uneven
    cut = distribute_tensor(ones, mesh(world), [Shard(0)]).requires_grad_()
    held = distribute_tensor(ones, mesh(world), [Replicate()]).requires_grad_()
    plain = ones.clone().requires_grad_()
    optimizer = MirrorDescent([cut, held, plain], 1e-3, rounding="stochastic")
    torch.manual_seed(0)
    for _ in range(5):
        for p in (cut, held, plain):
            p.grad = torch.ones_like(p)
        optimizer.step()
    for x in (held.to_local(), plain):
        of_first = x.detach().clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(x, of_first)
    rows = cut.full_tensor().detach()
    assert not torch.equal(rows[0], rows[-1])  # of the first process, and of the last
    assert not torch.equal(held.to_local(), plain)
    torch.testing.assert_close(rows.float().mean().item(), 1 - 5e-3, rtol=0, atol=1e-3)


@check
def sharded_parameters_that_were_changed_are_taken_as_they_are(world, folder):
    for name, options in CASES:
        plain, shards, one, other = pair(name, options, mesh(world), [Shard(0)], dual_state=True)
        step(0, plain, shards, one, other)
        with torch.no_grad():
            for p, q in zip(plain, shards, strict=True):
                p.mul_(1.0 if maps.create(name, plain, **options).domain == "simplex" else 0.5)
                q.copy_(distribute_tensor(p.detach(), q.device_mesh, q.placements))
        step(1, plain, shards, one, other)
        close(plain, shards)
        # After loading the values have to tell; here only those of the first process.
        for optimizer in (one, other):
            optimizer.load_state_dict(optimizer.state_dict())
        factor = 1.0 if maps.create(name, plain, **options).domain == "simplex" else 0.5
        with torch.no_grad():
            for p, q in zip(plain[:-1], shards[:-1], strict=True):
                p[:1] *= factor
                q.to_local()[:1] *= factor if dist.get_rank() == 0 else 1.0
        step(2, plain, shards, one, other)
        close(plain, shards)


@check
def what_one_process_writes_is_agreed_on(world, folder):
    for name in ("kronecker", "negative-entropy", "hypentropy"):
        factor = 1.0 if name == "negative-entropy" else 0.5
        plain, shards, one, other = pair(name, {}, mesh(world), [Shard(0)], dual_state=True)
        step(0, plain, shards, one, other)
        with torch.no_grad():
            for p, q in zip(plain[:-1], shards[:-1], strict=True):
                p[:1] *= factor
                if dist.get_rank() == 0:
                    q.to_local()[:1] *= factor
        step(1, plain, shards, one, other)
        close(plain, shards)


@check
def a_gradient_in_one_process_only_is_refused_in_all(world, folder):
    plain, shards, one, other = pair("kronecker", {}, mesh(world), [Shard(0)])
    step(0, plain, shards, one, other)
    before = [x.clone() for x in whole(x.detach() for x in shards)]
    if dist.get_rank() == 0:
        shards[1].grad = None
    with pytest.raises(InputError, match=r"parameter 1 .* has a gradient in some processes"):
        other.step()
    close(before, [x.detach() for x in shards])


@check
def processes_outside_of_the_mesh_have_nothing_to_do(world, folder):
    device_mesh = init_device_mesh("cpu", (world,))  # all take part in making its groups
    first = torch.distributed.device_mesh.DeviceMesh("cpu", [0])
    assert device_mesh.size() == world
    for name in ("hypentropy", "kronecker"):
        (x,) = values(shapes=((4, 3),))
        q = distribute_tensor(x, first, [Shard(0)]).requires_grad_()
        optimizer = MirrorDescent([q], 0.1, learned(name, [x], {}))
        q.grad = distribute_tensor(torch.ones_like(x), first, [Shard(0)])
        optimizer.step()
        if dist.get_rank() == 0:
            assert not torch.equal(q.to_local(), x)


# The trajectory is that of one process.


@check
def every_map_on_every_placement(world, folder):
    layouts = [(mesh(world), [Shard(0)])]
    if world == 4:
        layouts.append((square(4), [Shard(0), Shard(1)]))
    else:
        layouts += [(mesh(2), [Shard(1)]), (mesh(2), [Replicate()])]
    for name, options in CASES:
        for i, (device_mesh, placements) in enumerate(layouts):
            settings = [{"momentum": 0.9, "weight_decay": 0.1}, {"dual_state": True}][i % 2]
            case = pair(name, options, device_mesh, placements, lr=0.05, **settings)
            for k in range(3):
                step(k, *case)
            _, shards, one, other = case
            for q in shards:
                assert all(s.placements == q.placements for s in other.state[q].values())
            close(snapshot(one), snapshot(other))


@check
def the_map_may_be_built_from_the_shards(world, folder):
    for name in ("diagonal", "separable", "kronecker"):
        case = pair(name, {}, mesh(world), [Shard(0)], lr=0.05, momentum=0.9)
        plain, shards, one, _ = case
        built = maps.create(name, shards)
        mine = built.state_dict()
        with torch.no_grad():
            for key, value in one.param_groups[0]["mirror_map"].state_dict().items():
                x = mine[key]
                sharded = isinstance(x, DTensor)
                x.copy_(distribute_tensor(value, x.device_mesh, x.placements) if sharded else value)
        other = MirrorDescent(shards, lr=0.05, momentum=0.9, mirror_map=built)
        for k in range(3):
            step(k, plain, shards, one, other)
        close(snapshot(one), snapshot(other))
        again = MirrorDescent(shards, mirror_map=maps.create(name, shards))
        again.load_state_dict(other.state_dict())
        close(snapshot(again), snapshot(other))


@check
def fused_steps_on_shards(world, folder):
    if backends.cpp.unavailable() is not None:
        return
    for placements in ([Shard(0)], [Shard(1)]):
        case = pair("separable", {}, mesh(world), placements, dtype=torch.float32, lr=0.05,
                    momentum=0.9, fused=True)  # fmt: skip
        for k in range(3):
            step(k, *case)
        _, _, one, other = case
        torch.testing.assert_close(whole(snapshot(one)), whole(snapshot(other)))


# Real modules.


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64)


def train(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def optimizer_of(model, name, reference=None):
    mirror_map = learned(name, list((reference or model).parameters()), {})
    return MirrorDescent(model.parameters(), lr=0.1, momentum=0.9, mirror_map=mirror_map)


def alone(name, steps=3):
    model = network()
    optimizer = optimizer_of(model, name)
    train(model, optimizer, batch(), steps)
    return model, optimizer


def in_fsdp(world, name):
    model, device_mesh = network(), mesh(world)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=device_mesh)
    return model, optimizer_of(model, name, network())


def part(world):
    return batch().chunk(world)[dist.get_rank()]


@check
def fsdp_trains_as_one_process(world, folder):
    for name in ("hypentropy", "separable", "kronecker"):
        model, optimizer = in_fsdp(world, name)
        train(model, optimizer, part(world))
        close(list(model.parameters()), list(alone(name)[0].parameters()))


@check
def mixed_precision_and_clipping_are_those_of_sgd(world, folder):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ends, drops, start = [], [], list(network().float().parameters())
    for make in (
        lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
        lambda params: MirrorDescent(params, 0.1, momentum=0.9),
        lambda params: MirrorDescent(params, 0.1, learned("kronecker", start, {})),
    ):
        model = network().float()
        for layer in (model[0], model[2], model):  # nested, and uneven over the processes
            fully_shard(layer, mesh=mesh(world), mp_policy=policy)
        optimizer = make(list(model.parameters()))
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(part(world).float()).square().mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            assert isinstance(norm, DTensor)
            optimizer.step()
            losses.append(loss.item())
        ends.append([p.detach() for p in whole(model.parameters())])
        drops.append(losses[-1] < losses[0])
    assert all(map(torch.equal, ends[0], ends[1]))
    assert all(drops)


@check
def replicas_of_shards_are_rounded_stochastically_alike(world, folder):
    if world != 4:
        return
    model = nn.Linear(4, 8).bfloat16()
    fully_shard(model, mesh=square(4))  # copies over the first dimension, shards over the second
    optimizer = MirrorDescent(model.parameters(), 1e-3, rounding="stochastic")
    torch.manual_seed(0)
    torch.rand(dist.get_rank())  # as dropout on batches of unlike sizes does
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in model.parameters():
        shard, others = p.to_local().detach().float(), square(4)["data"].get_group()
        largest, smallest = shard.clone(), shard.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, others)
        dist.all_reduce(smallest, dist.ReduceOp.MIN, others)
        assert torch.equal(largest, smallest)


@check
def ddp_trains_as_one_process(world, folder):
    for name in ("hypentropy", "kronecker"):
        model = nn.parallel.DistributedDataParallel(network())
        train(model, optimizer_of(model, name), part(world))
        close(list(model.parameters()), list(alone(name)[0].parameters()))


@check
def tensor_parallel_trains_as_one_process(world, folder):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for name in ("hypentropy", "separable", "kronecker"):
        model = parallelize_module(network(), mesh(world), plan)
        train(model, optimizer_of(model, name, network()), batch())
        close(list(model.parameters()), list(alone(name)[0].parameters()))
        if world == 4:  # over which FSDP2 cuts once more
            device_mesh = square(4)
            model = parallelize_module(network(), device_mesh["tensor"], plan)
            fully_shard(model, mesh=device_mesh["data"])
            x = batch().chunk(2)[device_mesh["data"].get_local_rank()]
            train(model, optimizer_of(model, name, network()), x)
            close(list(model.parameters()), list(alone(name)[0].parameters()))


# What is communicated.


@check
def a_map_gathers_what_it_couples_and_no_more(world, folder):
    def gathers(name, options, placements, **settings):
        case = pair(name, options, mesh(world), placements, lr=0.05, nonfinite="propagate",
                    shapes=((4, 8), (8,)), **settings)  # fmt: skip
        step(0, *case)
        give(1, *case[:2])
        with CommDebugMode() as counted:
            case[-1].step()
        return counted.get_total_counts()

    for name in ("euclidean", "pnorm", "hypentropy", "diagonal", "separable"):
        for fused in (None, False):
            assert gathers(name, {}, [Shard(0)], momentum=0.9, fused=fused) == 0
    assert gathers("negative-entropy", {"simplex": False}, [Shard(1)]) == 0
    # Where processes have to meet they agree for which tensors, and then gather: on the simplex the
    # matrix is cut between its rows, or across them, and the vector, one row, is cut or whole: one
    # of the two is gathered, on its way from its dual state.
    assert gathers("negative-entropy", {}, [Shard(0)], dual_state=True) == 1 + 1
    assert gathers("negative-entropy", {}, [Shard(1)], dual_state=True) == 1 + 1
    assert gathers("negative-entropy", {}, [Shard(0)]) == 1 + 2  # and on its way there
    assert gathers("kronecker", {}, [Shard(0)]) == 1 + 2  # both, from their dual state
    assert gathers("kronecker", {}, [Replicate()]) == 0


@check
def agreeing_takes_one_reduction(world, folder):
    case = pair("hypentropy", {}, mesh(world), [Shard(0)], lr=0.05)
    step(0, *case)
    operators = []
    reduce = dist.all_reduce

    def counted(*args, **kwargs):
        operators.append(args[0].numel())
        return reduce(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        step(1, *case)
    assert operators == [1]


@check
def a_compiled_step_is_that_of_one_process(world, folder):
    torch._dynamo.reset()
    plain, shards, one, other = pair("hypentropy", {}, mesh(world), [Shard(0)], lr=0.05)
    compiled = torch.compile(other.step, backend="aot_eager")
    for k in range(2):
        give(k, plain, shards)
        one.step()
        compiled()
    close([p.detach() for p in plain], [q.detach() for q in shards])


@check
def a_partial_gradient_is_reduced(world, folder):
    (p,), (q,), one, other = pair("euclidean", {}, mesh(world), [Shard(0)], ((4, 2),), lr=0.1)
    p.grad = torch.full_like(p, float(world))
    q.grad = DTensor.from_local(torch.ones(4, 2, dtype=p.dtype), q.device_mesh, [Partial()])
    one.step()
    other.step()
    close([p], [q])


# Failures.


@check
def a_step_that_fails_in_one_process_fails_in_all(world, folder):
    for name, options in (("hypentropy", {}), ("separable", {"parametrization": "primal"})):
        for policy, fused in (("raise", None), ("skip", None), ("skip", False), ("raise", False)):
            shapes = ((8, 2), (2,))
            case = pair(name, options, mesh(world), [Shard(0)], shapes, torch.float32, lr=0.05,
                        momentum=0.9, nonfinite=policy, fused=fused)  # fmt: skip
            step(0, *case)
            _, shards, _, other = case
            before = [t.to_local() for t in snapshot(other)]
            if dist.get_rank() == 1:
                shards[0].grad.to_local()[0, 0] = torch.nan
            expected = contextlib.nullcontext()
            if policy == "raise":
                where = "gradient of" if dist.get_rank() == 1 else "fails in another process"
                expected = pytest.raises(FloatingPointError, match=where)
            with expected:
                other.step()
            assert same([t.to_local() for t in snapshot(other)], before)
            step(1, *case)  # and all go on together


@check
def a_scaler_divides_the_gradients_of_shards(world, folder):
    for name in ("euclidean", "separable"):  # the scaler does, the fused step does
        case = pair(name, {}, mesh(world), [Shard(0)], dtype=torch.float32, lr=0.05)
        plain, shards, one, other = case
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.zeros(()))
        give(0, plain, shards)
        for q in shards:
            q.grad = q.grad * 64
        one.step()
        scaler.step(other)
        scaler.update()
        torch.testing.assert_close(whole(plain), whole(shards))


@check
def a_step_that_the_scaler_skips_in_one_process_is_skipped_in_all(world, folder):
    for fused in (None, False):
        case = pair("separable", {}, mesh(world), [Shard(0)], lr=0.05, momentum=0.9, fused=fused)
        step(0, *case)
        other = case[-1]
        before = [t.to_local() for t in snapshot(other)]
        other.found_inf = torch.tensor(float(dist.get_rank() == 1))
        other.step()
        del other.found_inf
        assert same([t.to_local() for t in snapshot(other)], before)


@check
def placements_that_are_not_supported_are_refused(world, folder):
    p = DTensor.from_local(torch.ones(4), mesh(world), [Partial()]).requires_grad_()
    with pytest.raises(InputError, match=r"parameter 0 of its group is placed as .*Partial"):
        MirrorDescent([p])
    (q,) = spread([torch.ones(4)], mesh(world), [Shard(0)])
    with pytest.raises(InputError, match="differentiable=True with DTensor parameters"):
        MirrorDescent([q], differentiable=True)
    with pytest.raises(InputError, match="not in the domain of NegativeEntropy"):
        MirrorDescent([q], mirror_map=maps.NegativeEntropy())


# Checkpoints: saved by 2 processes, loaded by 1 and by 4.


def save(model, optimizer, folder):
    saved = {"model": states.get_model_state_dict(model),
             "optimizer": states.get_optimizer_state_dict(model, optimizer)}  # fmt: skip
    checkpoint.save(saved, checkpoint_id=folder)


def load(model, optimizer, folder):
    loaded = {"model": states.get_model_state_dict(model),
              "optimizer": states.get_optimizer_state_dict(model, optimizer)}  # fmt: skip
    checkpoint.load(loaded, checkpoint_id=folder)
    states.set_model_state_dict(model, loaded["model"])
    states.set_optimizer_state_dict(model, optimizer, loaded["optimizer"])


MAPS_SAVED = ("separable", "kronecker")


@check
def a_checkpoint_of_two_processes_goes_on_in_any_number(world, folder):
    for name in MAPS_SAVED:
        model, optimizer = in_fsdp(world, name)
        if world == 2:
            train(model, optimizer, part(world))
            save(model, optimizer, folder / name)
        load(model, optimizer, folder / name)
        train(model, optimizer, part(world))
        close(list(model.parameters()), list(alone(name, 6)[0].parameters()))


@check
def a_full_state_dict_goes_out_and_comes_back(world, folder):
    full = states.StateDictOptions(full_state_dict=True)
    spread_out = states.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for name in ("euclidean", "diagonal", "hypentropy", "separable"):
        model, optimizer = in_fsdp(world, name)
        train(model, optimizer, part(world))
        saved = states.get_optimizer_state_dict(model, optimizer, options=full)
        for options in (full, spread_out):
            other, loaded = in_fsdp(world, name)
            known = saved if options is full or dist.get_rank() == 0 else {}
            states.set_optimizer_state_dict(other, loaded, copy.deepcopy(known), options=options)
            for a, b in zip(snapshot(optimizer), snapshot(loaded), strict=True):
                assert a.shape == b.shape
            close([t for s in optimizer.state.values() for t in s.values()],
                  [t for s in loaded.state.values() for t in s.values()])  # fmt: skip


@check
def a_whole_state_dict_loads_into_shards(world, folder):
    _, saved = alone("separable")
    model, optimizer = in_fsdp(world, "separable")
    optimizer.load_state_dict(saved.state_dict())
    close([t for s in saved.state.values() for t in s.values()],
          [t for s in optimizer.state.values() for t in s.values()])  # fmt: skip
    assert all(isinstance(t, DTensor) for s in optimizer.state.values() for t in s.values())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)  # each process its shards
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=False))
    train(model, optimizer, part(world), 1)
