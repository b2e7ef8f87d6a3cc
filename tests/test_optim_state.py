"""State is what the steps that were taken made of it, and follows parameters that others change."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from optim_cases import descend, parameter, same, snapshot

from mirror_opt import backends, maps
from mirror_opt.errors import InputError
from mirror_opt.optim import MirrorDescent

DUAL = {
    "kronecker": lambda p: (maps.KroneckerNeural([p]), {}),
    "separable": lambda p: (maps.SeparableNeural([p]), {}),
    "diagonal": lambda p: (maps.Diagonal([p]), {"dual_state": True, "momentum": 0.9}),
    "hypentropy": lambda p: (maps.Hypentropy(), {"dual_state": True}),
    "positive": lambda p: (maps.NegativeEntropy(simplex=False), {"dual_state": True}),
}
over_duals = pytest.mark.parametrize("name", DUAL)


def beginning(name, values=(1.0, 2.0, 3.0), dtype=torch.float32, **options):
    p = parameter(*values, dtype=dtype)
    mirror_map, settings = DUAL[name](p)
    return p, MirrorDescent([p], 0.1, mirror_map, **settings, **options)


def fill(p, *values):
    with torch.no_grad():
        p.copy_(torch.tensor(values))


# A step that is not taken leaves no state.


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("what", ["gradient", "parameter"])
@over_duals
def test_a_first_step_that_fails_leaves_nothing_behind(name, what, nonfinite):
    p, optimizer = beginning(name, nonfinite=nonfinite)
    p.grad = torch.ones(3)
    (p.grad if what == "gradient" else p.detach())[1] = torch.nan
    if nonfinite == "raise":
        with pytest.raises(ArithmeticError):
            optimizer.step()
    else:
        optimizer.step()
    assert not optimizer.state
    fresh, other = beginning(name, (4.0, 5.0, 6.0), nonfinite=nonfinite)
    fill(p, 4.0, 5.0, 6.0)
    for q, each in ((p, optimizer), (fresh, other)):
        q.grad = torch.ones(3)
        each.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_input_errors_leave_no_state():
    first, second = parameter(1.0, 2.0), parameter(3.0, 4.0)
    optimizer = MirrorDescent([first, second], momentum=0.9)
    first.grad, second.grad = torch.ones(2), torch.ones(2).to_sparse()
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    assert not optimizer.state
    if backends.cpp.unavailable() is None:
        optimizer = MirrorDescent([first], 0.1, maps.SeparableNeural([first], sigma="tanh"))
        with backends.use_backend("cpp"), pytest.raises(InputError, match="cpp"):
            optimizer.step()
        assert not optimizer.state


def test_a_step_that_the_scaler_skips_leaves_no_state():
    for nonfinite in ("raise", "skip"):
        p, optimizer = beginning("kronecker", nonfinite=nonfinite)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale((p * torch.inf).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert not optimizer.state


def test_an_error_leaves_no_scale_for_later_steps():
    p = parameter(1.0, 1.0)
    optimizer = MirrorDescent([p], 1e38, maps.SeparableNeural([p]))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * 100).sum()).backward()
    with pytest.raises(FloatingPointError, match="leaves the range"):
        scaler.step(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    scaler.update()
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(p.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.8))


# Parameters that others write to.


@over_duals
def test_parameters_that_were_changed_are_taken_as_they_are(name):
    p, optimizer = beginning(name)
    descend(optimizer, [p], 2)
    fill(p, 0.5, 0.7, 0.9)
    p.grad = torch.zeros(3)
    for buffer in optimizer.state[p].values():
        if buffer is optimizer.state[p].get("momentum_buffer"):
            buffer.zero_()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([0.5, 0.7, 0.9]))
    before = optimizer.state[p]["dual"].clone()
    optimizer.step()
    assert torch.equal(before, optimizer.state[p]["dual"])  # nobody has changed it since


@over_duals
def test_a_step_that_fails_restores_the_dual_of_changed_parameters(name):
    p, optimizer = beginning(name)
    descend(optimizer, [p], 1)
    fill(p, 0.5, 0.7, 0.9)
    before = snapshot(optimizer)
    p.grad[0] = torch.nan
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert same(before, snapshot(optimizer))


@over_duals
def test_entries_that_were_not_changed_keep_their_master_copy(name):
    p, optimizer = beginning(name, dtype=torch.bfloat16)
    q, other = beginning(name, dtype=torch.bfloat16)
    for k in range(3):
        for x in (p, q):
            x.grad = torch.full_like(x, 1e-3)
        other.step()
        optimizer.step()
        if k == 1:
            with torch.no_grad():
                p[0] = 1.5
                q.copy_(q.clone())  # the same values: counted as a change that is none
    if name != "kronecker":  # which has no rotation of a vector, but a solve to get there
        torch.testing.assert_close(optimizer.state[p]["dual"][1:], other.state[q]["dual"][1:])
    torch.testing.assert_close(p.detach()[1:], q.detach()[1:], rtol=0, atol=0)
    assert abs(p[0].item() - 1.5) < 0.01


def test_options_that_change_between_steps():
    p, optimizer = beginning("hypentropy")
    q = parameter(1.0, 2.0, 3.0)
    stateless = MirrorDescent([q], 0.1, maps.Hypentropy())
    for keeps in (True, False, False, True):
        optimizer.param_groups[0]["dual_state"] = keeps
        descend(optimizer, [p], 1)
        descend(stateless, [q], 1)
    torch.testing.assert_close(p, q)
    for group in (optimizer.param_groups[0], stateless.param_groups[0]):
        group["mirror_map"] = maps.Hypentropy(0.1)
    descend(optimizer, [p], 1)
    descend(stateless, [q], 1)
    torch.testing.assert_close(p, q)
    for anchor in ("init", "zero"):
        optimizer.param_groups[0]["anchor"] = anchor
        descend(optimizer, [p], 1)
    assert p.isfinite().all()


@pytest.mark.parametrize("name", [*DUAL, "momentum"])
def test_parameters_that_change_their_shape_are_refused(name):
    if name == "momentum":
        p = parameter(1.0, 2.0, 3.0)
        optimizer = MirrorDescent([p], 0.1, maps.Hypentropy(), momentum=0.9)
    else:
        p, optimizer = beginning(name)
    descend(optimizer, [p], 1)
    p.data, p.grad = torch.ones(2, 3), None
    p.grad = torch.ones(2, 3)
    before = snapshot(optimizer)
    with pytest.raises(InputError, match=r"shape \(2, 3\) now, and .* of \(3,\): build"):
        optimizer.step()
    assert same(before, snapshot(optimizer))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", ["separable", "kronecker", "diagonal"])
def test_parameters_that_come_or_go_beside_a_map_of_their_own_are_refused(name, fused):
    params = [parameter(1.0, 2.0, 3.0), parameter(1.0, 2.0, 3.0)]
    mirror_map = maps.create(name, params)
    optimizer = MirrorDescent(params, 0.1, mirror_map, fused=fused)
    descend(optimizer, params, 1)
    group = optimizer.param_groups[0]
    for changed in (params[1:], [*params, parameter(1.0, 2.0, 3.0)]):
        group["params"] = changed
        before = [p.detach().clone() for p in changed]
        for p in changed:
            p.grad = torch.ones(3)
        with pytest.raises(InputError, match=r"parameters now and its mirror map was built for 2"):
            optimizer.step()
        assert all(map(torch.equal, before, changed))


@over_duals
def test_a_first_step_at_a_rate_of_zero_makes_the_state_whatever_the_parameters_hold(name):
    # So torch.distributed.checkpoint does, before it loads both.
    p, optimizer = beginning(name)
    fresh, other = beginning(name)
    fill(p, torch.nan, torch.inf, 1.0)
    for q, each in ((p, optimizer), (fresh, other)):
        each.param_groups[0]["lr"] = 0.0
        q.grad = torch.zeros(3)
        each.step()
    assert optimizer.state[p].keys() == other.state[fresh].keys()
    descend(other, [fresh], 2)
    fill(p, *fresh.tolist())
    optimizer.load_state_dict(other.state_dict())
    for q, each in ((p, optimizer), (fresh, other)):
        each.param_groups[0]["lr"] = 0.1
        q.grad = torch.ones(3)
        each.step()
    assert same(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("name", ["kronecker", "separable"])
def test_such_a_first_step_without_an_anchor(name):
    p, optimizer = beginning(name, anchor="zero")
    fill(p, torch.nan, torch.inf, 1.0)
    optimizer.param_groups[0]["lr"] = 0.0
    p.grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.state[p].keys() == {"dual", "dual_init"}
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ArithmeticError):
        optimizer.step()


def reloaded(p, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return p, optimizer


def pickled(p, optimizer):
    return pickle.loads(pickle.dumps((p, optimizer)))


def copied(p, optimizer):
    return copy.deepcopy((p, optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("again", [reloaded, pickled, copied])
@over_duals
def test_weights_that_are_written_after_loading_are_taken_as_they_are(name, again, dtype):
    p, optimizer = beginning(name, dtype=dtype)
    descend(optimizer, [p], 2)
    p, optimizer = again(p, optimizer)
    optimizer.param_groups[0]["momentum"] = 0.0
    fill(p, 4.0, 0.75, 6.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([4.0, 0.75, 6.0], dtype=dtype))


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.float64], ids=str)
@over_duals
def test_a_master_copy_survives_loading_into_another_dtype(name, to):
    p, optimizer = beginning(name, dtype=torch.bfloat16)
    for _ in range(3):
        p.grad = torch.full_like(p, 1e-3)
        optimizer.step()
    q, other = beginning(name, dtype=to)
    other.load_state_dict(optimizer.state_dict())
    fill(q, *p.tolist())
    for x, o in ((p, optimizer), (q, other)):
        o.param_groups[0]["momentum"] = 0.0
        x.grad = torch.zeros_like(x)
        o.step()
    for key, value in optimizer.state[p].items():
        torch.testing.assert_close(other.state[q][key].float(), value)


@over_duals
def test_weights_that_are_replaced_at_an_old_address_are_seen(name):
    p, optimizer = beginning(name)
    optimizer.param_groups[0]["momentum"] = 0.0
    buffer = np.zeros(3, np.float32)
    for value in (0.3, 0.4, 0.5):
        buffer[:] = value
        p.data = torch.from_numpy(buffer)
        p.grad = torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), value))


def test_weights_are_seen_whatever_their_place_in_the_group():
    params = [parameter(1.0, 2.0) for _ in range(3)]
    optimizer = MirrorDescent(params, 0.1, maps.Hypentropy(), dual_state=True)
    descend(optimizer, params, 1)
    optimizer.param_groups[0]["params"] = params[1:]
    fill(params[2], 5.0, 5.0)
    for p in params[1:]:
        p.grad = torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(params[2].detach(), torch.full((2,), 5.0))


def test_parameters_that_are_taken_out_are_let_go():
    p, q = parameter(1.0), parameter(2.0)
    optimizer = MirrorDescent(
        [{"params": [p]}, {"params": [q]}], 0.1, maps.Hypentropy(), dual_state=True
    )
    descend(optimizer, [p, q], 1)
    optimizer.param_groups.pop()
    del optimizer.state[q]
    gone = weakref.ref(q)
    del q
    gc.collect()
    assert gone() is None


def test_a_parameter_without_a_gradient_in_the_first_step_after_loading():
    params = [parameter(1.0, 2.0), parameter(3.0, 4.0)]
    optimizer = MirrorDescent(params, 0.1, maps.Hypentropy(), dual_state=True)
    descend(optimizer, params, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    fill(params[1], 7.0, 8.0)
    for second in (None, torch.zeros(2)):
        params[0].grad, params[1].grad = torch.ones(2), second
        optimizer.step()
    torch.testing.assert_close(params[1].detach(), torch.tensor([7.0, 8.0]))


def test_a_dual_state_that_was_left_behind_does_not_come_back():
    p, optimizer = beginning("hypentropy")
    descend(optimizer, [p], 2)
    optimizer.param_groups[0]["dual_state"] = False
    descend(optimizer, [p], 5)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["dual_state"] = True
    before = p.detach().clone()
    p.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), before)


@pytest.mark.parametrize("again", [reloaded, copied])
def test_entries_of_others_in_the_state_are_left_alone(again):
    p, optimizer = beginning("hypentropy")
    optimizer.state[p]["note"] = 1
    descend(optimizer, [p], 2)
    p, optimizer = again(p, optimizer)
    descend(optimizer, [p], 2)
    assert optimizer.state[p]["note"] == 1


@pytest.mark.parametrize("name", ["hypentropy", "separable", "kronecker"])
def test_writes_to_inference_tensors_are_seen(name):
    with torch.inference_mode():
        p = torch.tensor([1.0, 2.0, 3.0])
        mirror_map, settings = DUAL[name](p)
        optimizer = MirrorDescent([p], 0.1, mirror_map, **settings)
        p.grad = torch.ones(3)
        optimizer.step()
        p.fill_(7.0)
        p.grad = torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(p, torch.full((3,), 7.0))


def test_state_of_inference_mode_is_written_to_outside():
    ends = []
    for inference in (True, False):
        p = parameter(1.0, 2.0, 3.0)
        optimizer = MirrorDescent([p], 0.1, maps.Hypentropy(), momentum=0.9, dual_state=True)
        for mode in (inference, False):
            p.grad = torch.ones(3)
            with torch.inference_mode(mode):
                optimizer.step()
        ends.append(p.detach())
    assert torch.equal(*ends)


@over_duals
def test_other_memory_is_taken_as_it_is(name):
    p, optimizer = beginning(name)
    descend(optimizer, [p], 2)
    torch.nn.utils.vector_to_parameters(torch.tensor([4.0, 5.0, 6.0]), [p])
    optimizer.param_groups[0] |= {"lr": 1e-9, "momentum": 0.0}
    descend(optimizer, [p], 1)
    torch.testing.assert_close(p.detach(), torch.tensor([4.0, 5.0, 6.0]))


@over_duals
def test_parameters_without_data(name):
    p = torch.empty(3, device="meta", requires_grad=True)
    mirror_map, settings = DUAL[name](torch.empty(3, device="meta"))
    optimizer = MirrorDescent([p], 0.1, mirror_map, **{"momentum": 0.9, **settings})
    for _ in range(2):
        p.grad = torch.empty(3, device="meta")
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert all(x.is_meta for x in optimizer.state[p].values())


def test_a_scaler_that_has_seen_no_gradient():
    for p in (parameter(1.0, 2.0), torch.nn.Parameter(torch.zeros(0))):
        optimizer = MirrorDescent([p], 0.1, maps.SeparableNeural([p]))
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(torch.ones(()))
        scaler.step(optimizer)
        assert not optimizer.state


def test_parameters_of_another_shape_than_the_map_are_refused_from_the_start():
    p = parameter(1.0, 2.0, 3.0)
    optimizer = MirrorDescent([p], 0.1, maps.Diagonal([p]))
    p.data = torch.ones(2, 3)
    p.grad = torch.ones(2, 3)
    with pytest.raises(InputError, match=r"its mirror map of \(3,\)"):
        optimizer.step()
