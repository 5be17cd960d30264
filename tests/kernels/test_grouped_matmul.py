import inspect
import itertools
import logging

import pytest
import torch
from llmtrain_kernels import grouped_matmul as module
from llmtrain_kernels.grouped_matmul import (
    cost,
    from_groups,
    group_pairs,
    grouped_matmul,
    matrix_gradients,
    reference,
    rows_by_matrix,
    select_backend,
    to_groups,
    unsupported,
)
from torch.utils.flop_counter import FlopCounterMode

E, D, F = 5, 16, 8
COUNTS = {
    "uneven": [3, 7, 1, 4, 9],
    "empty experts": [0, 12, 0, 12, 0],
    "one expert": [0, 0, 24, 0, 0],
    "no rows": [0, 0, 0, 0, 0],
}


def make(counts, extra=0, dtype=torch.float64, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    rows = sum(counts) + extra
    x_PD = torch.randn(rows, D, generator=generator, dtype=torch.float64).to(dtype)
    weight_EFD = torch.randn(E, F, D, generator=generator, dtype=torch.float64).to(dtype)
    ends_E = torch.tensor(counts).cumsum(0).to(torch.int32)
    return x_PD.requires_grad_(requires_grad), weight_EFD.requires_grad_(requires_grad), ends_E


def by_rows(x_PD, weight_EFD, ends_E):
    """Row for row, each with a copy of its matrix; rows behind the last end get zeros."""
    rows = [
        weight_EFD[int((ends_E <= p).sum())] @ x_PD[p] if p < ends_E[-1] else x_PD.new_zeros(F)
        for p in range(len(x_PD))
    ]
    return torch.stack(rows) if rows else x_PD.new_zeros(0, F)


def with_gradients(function, x_PD, weight_EFD, *rest, weights_PF, **how):
    y_PF = function(x_PD, weight_EFD, *rest, **how)
    if not y_PF.requires_grad:  # no rows: nothing to differentiate
        return [y_PF, torch.zeros_like(x_PD), torch.zeros_like(weight_EFD)]
    return [y_PF, *torch.autograd.grad((y_PF * weights_PF).sum(), [x_PD, weight_EFD])]


def test_backends_share_the_signature():
    public = dict(inspect.signature(grouped_matmul).parameters)
    del public["backend"]
    assert list(public.values()) == list(inspect.signature(reference).parameters.values())


@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("backend", ["loop", "masked", "auto"])
def test_float64_equals_row_by_row(backend, counts, extra):
    inputs = make(COUNTS[counts], extra)
    weights_PF = torch.randn(len(inputs[0]), F, dtype=torch.float64)
    got = with_gradients(
        grouped_matmul, *inputs, weights_PF=weights_PF, partial=extra > 0, backend=backend
    )
    expected = with_gradients(by_rows, *inputs, weights_PF=weights_PF)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("extra", [0, 6])
@pytest.mark.parametrize("counts", ["uneven", "empty experts", "one expert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_kernel_is_as_exact_as_the_loop(dtype, counts, extra):
    """Against float64 of the same numbers: at most twice the loop's own error."""
    x_PD, weight_EFD, ends_E = make(COUNTS[counts], extra, dtype)
    weights_PF = torch.randn(len(x_PD), F).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (x_PD, weight_EFD)]
    expected = with_gradients(by_rows, *exact, ends_E, weights_PF=weights_PF.double())
    errors = {}
    for backend in ("loop", "masked", "grouped"):
        got = with_gradients(
            grouped_matmul,
            x_PD,
            weight_EFD,
            ends_E,
            weights_PF=weights_PF,
            partial=extra > 0,
            backend=backend,
        )
        errors[backend] = [(g.double() - e).abs().max() for g, e in zip(got, expected)]
        assert [g.dtype for g in got] == [dtype] * 3
    for ours, loop, value in zip(errors["grouped"], errors["loop"], expected, strict=True):
        assert ours <= 2 * loop + torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize("backend", ["grouped", "auto"])
def test_layouts_of_input_and_gradient_do_not_matter(backend):
    """A transposed input and the gradient of a sum, whose strides are zero."""
    x_PD, weight_EFD, ends_E = make(COUNTS["uneven"], dtype=torch.float32)
    turned_PD = x_PD.detach().T.contiguous().T.requires_grad_()
    got = grouped_matmul(turned_PD, weight_EFD, ends_E, backend=backend)
    expected = reference(x_PD, weight_EFD, ends_E)
    torch.testing.assert_close(got, expected)
    gradients = torch.autograd.grad(got.sum(), [turned_PD, weight_EFD])
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected.sum(), [x_PD, weight_EFD]), rtol=1e-5, atol=1e-5
    )


def test_rows_behind_the_last_end_are_zero_whatever_was_in_memory(monkeypatch):
    """torch's kernel writes nothing there; here it leaves NaN."""
    plain = module.native()

    def poisoned(a, b, *, offs):
        y = plain(a, b, offs=offs)
        if y.ndim == 2:
            y[int(offs[-1]) :] = float("nan")
        return y

    monkeypatch.setattr(module, "native", lambda: poisoned)
    x_PD, weight_EFD, ends_E = make(COUNTS["uneven"], 6, torch.float32)
    y_PF = grouped_matmul(x_PD, weight_EFD, ends_E, partial=True, backend="grouped")
    assert y_PF[-6:].eq(0).all()
    grad_PD, grad_EFD = torch.autograd.grad(y_PF.square().sum(), [x_PD, weight_EFD])
    assert grad_PD[-6:].eq(0).all()
    assert grad_PD.isfinite().all()
    assert grad_EFD.isfinite().all()


@pytest.mark.parametrize("backend", ["loop", "masked", "grouped"])
def test_operations_are_registered_right(backend):
    """Schema, fake tensors and autograd, as torch checks them."""
    inputs = make(COUNTS["empty experts"], dtype=torch.float32)
    torch.library.opcheck(rows_by_matrix, (*inputs, backend, False))
    x_PD, _, ends_E = make(COUNTS["uneven"], dtype=torch.float32, requires_grad=False)
    torch.library.opcheck(matrix_gradients, (x_PD[:, :F].clone(), x_PD, ends_E, backend))


@pytest.mark.parametrize("backend", ["loop", "auto"])
def test_flops_and_cost(backend):
    x_PD, weight_EFD, ends_E = make(COUNTS["uneven"])
    forward, backward = cost(pairs=24, experts=E, d_in=D, d_out=F, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        y_PF = grouped_matmul(x_PD, weight_EFD, ends_E, backend=backend)
    assert counter.get_total_flops() == forward.flops == 2 * 24 * D * F
    with FlopCounterMode(display=False) as counter:
        y_PF.square().sum().backward()
    assert counter.get_total_flops() == backward.flops
    assert forward.bytes_read == 8 * (x_PD.numel() + weight_EFD.numel())
    assert forward.bytes_written == 8 * y_PF.numel()
    assert forward.saved_bytes == forward.bytes_read
    assert backward.bytes_read == forward.bytes_read + 2 * forward.bytes_written
    assert backward.bytes_written == forward.bytes_read


def brute_force(expert_NA, n_experts, capacity):
    """(pairs of each expert in order, load of each expert)"""
    members = [[] for _ in range(n_experts)]
    loads = [0] * n_experts
    for pair, expert in enumerate(expert_NA.flatten().tolist()):
        loads[expert] += 1
        if capacity is None or len(members[expert]) < capacity:
            members[expert].append(pair)
    return members, loads


@pytest.mark.parametrize("capacity", [None, 1, 4, 100])
def test_pairs_are_grouped_in_order(capacity):
    generator = torch.Generator().manual_seed(0)
    expert_NA = torch.rand(12, E, generator=generator).topk(2).indices % 4  # the last has none
    groups = group_pairs(expert_NA, E, capacity)
    members, loads = brute_force(expert_NA, E, capacity)
    starts = [0, *groups.ends_E.tolist()]
    order = groups.order_P.tolist()
    assert [order[a:b] for a, b in itertools.pairwise(starts)] == members
    assert groups.loads_E.tolist() == loads
    assert sorted(order) == list(range(24))
    assert [order[i] for i in groups.inverse_P.tolist()] == list(range(24))
    assert groups.ends_E.dtype == torch.int32


def test_rows_go_to_their_groups_and_back():
    expert_NA = torch.tensor([[3, 1], [0, 3], [1, 4], [3, 0]])
    groups = group_pairs(expert_NA, E)
    x_ND = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x_PD = to_groups(x_ND, groups, 2)
    for row, pair in zip(x_PD, groups.order_P.tolist(), strict=True):
        assert row.equal(x_ND[pair // 2])
    assert from_groups(x_PD, groups, 2).equal(x_ND[:, None].expand(4, 2, 3))
    assert torch.autograd.gradcheck(lambda x: to_groups(x, groups, 2).sin(), (x_ND,))
    y_PD = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: from_groups(y, groups, 2).sin(), (y_PD,))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (("cuda", (9, 0), torch.bfloat16, 64, 128), None),
        (("cuda", (8, 0), torch.bfloat16, 64, 128), None),
        (("cuda", (7, 5), torch.bfloat16, 64, 128), "it needs compute capability 8.0, not 7.5"),
        (("cuda", (9, 0), torch.float32, 64, 128), "on cuda it takes bfloat16, not float32"),
        (("cuda", (9, 0), torch.bfloat16, 64, 12), "widths 64 and 12 are not both multiples of 8"),
        (("cpu", None, torch.float32, 6, 8), "widths 6 and 8 are not both multiples of 4"),
        (("cpu", None, torch.float64, 8, 8), "on cpu it takes float32, bfloat16, float16, not flo"),
        (("mps", None, torch.float32, 8, 8), "on mps it takes nothing, not float32"),
    ],
)
def test_where_torchs_kernel_can_run(case, reason):
    found = unsupported(*case)
    assert found == reason or found.startswith(reason)


def test_an_old_torch_has_no_kernel(monkeypatch):
    monkeypatch.setattr(module, "native", lambda: None)
    assert unsupported("cpu", None, torch.float32, 8, 8) == "this torch has no grouped_mm"


def test_auto_takes_the_kernel_on_a_gpu_alone_and_says_so_once(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda ordinal: (9, 0))
    module.choice.cache_clear()
    for _ in range(2):
        assert select_backend("auto", "cuda", 0, torch.bfloat16, 64, 64) == "grouped"
        assert select_backend("auto", "cuda", 0, torch.float32, 64, 64) == "loop"
        assert select_backend("auto", "cpu", None, torch.float32, 64, 64) == "loop"
    found = [(record.levelname, record.message) for record in caplog.records]
    assert found == [
        ("INFO", "grouped_matmul: grouped on cuda (one kernel)"),
        ("WARNING", "grouped_matmul: loop on cuda (on cuda it takes bfloat16, not float32)"),
        ("INFO", "grouped_matmul: loop on cpu (no kernel to gain on a CPU)"),
    ]
    module.choice.cache_clear()


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (
            "fast",
            r"backend: got 'fast', expected auto or one of grouped, loop, masked; set channel",
        ),
        ("grouped", r"backend=grouped: on cpu it takes .* not float64; set channel.backend=auto"),
    ],
)
def test_backend_errors(backend, message):
    with pytest.raises(ValueError, match=message):
        grouped_matmul(*make(COUNTS["uneven"]), backend=backend)
