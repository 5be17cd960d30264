"""AdamW's step: the definition against torch.optim.AdamW, choices, errors, costs."""

import pytest
import torch
from llmtrain_kernels.adamw import BACKENDS, adamw_step, cost, norm_cost, sum_of_squares

KNOBS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
SIZES = [3, 1, 20]


def draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator, dtype=torch.float64).to(dtype) for n in SIZES]


def state(dtype=torch.float64):
    """p, g, m, v and the counters before any step."""
    zeros = [[torch.zeros(n, dtype=dtype) for n in SIZES] for _ in range(2)]
    return draw(0, dtype), draw(1, dtype), *zeros, [torch.tensor(0.0) for _ in SIZES]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_is_torchs_adamw(backend):
    p, _, m, v, steps = state()
    theirs = [torch.nn.Parameter(z.clone()) for z in p]
    optimizer = torch.optim.AdamW(
        theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for step in range(4):
        g = draw(10 + step)
        for parameter, gradient in zip(theirs, g):
            parameter.grad = gradient / 8
        optimizer.step()
        scale = torch.tensor(8.0)
        adamw_step(p, g, m, v, steps, **KNOBS, grad_scale=scale, backend=backend)
    for mine, parameter in zip(p, theirs):
        torch.testing.assert_close(mine, parameter.detach(), rtol=1e-12, atol=1e-12)
    for kinds, name in ((m, "exp_avg"), (v, "exp_avg_sq")):
        for mine, parameter in zip(kinds, theirs):
            torch.testing.assert_close(mine, optimizer.state[parameter][name])
    assert [step.item() for step in steps] == [4.0] * len(SIZES)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_skipped_and_copied(backend):
    lists = state(torch.float32)
    before = [[z.clone() for z in some] for some in (lists[0], *lists[2:])]
    copies = [torch.zeros(n, dtype=torch.bfloat16) for n in SIZES]
    lists[1][0].fill_(torch.inf)
    adamw_step(*lists, **KNOBS, found_inf=torch.tensor(1.0), backend=backend)
    torch.testing.assert_close([lists[0], *lists[2:]], before, rtol=0, atol=0)
    lists[1][0].fill_(1.0)
    adamw_step(*lists, **KNOBS, found_inf=torch.tensor(0.0), copies=copies, backend=backend)
    for copy, p in zip(copies, lists[0]):
        assert torch.equal(copy, p.bfloat16())


def test_auto_on_a_cpu_is_torchs_bit_for_bit():
    one, two = state(torch.float32), state(torch.float32)
    optimizer = torch.optim.AdamW(
        [torch.nn.Parameter(z) for z in two[0]], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1,
        fused=True,
    )  # fmt: skip
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], two[1]):
        parameter.grad = gradient
    optimizer.grad_scale = scale = torch.tensor(3.0)
    optimizer.step()
    adamw_step(*one, **KNOBS, grad_scale=scale)
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=0)
    expected = torch.nn.utils.get_total_norm(one[1]).to(torch.float64).square()
    assert torch.equal(sum_of_squares(one[1]), expected)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_sum_of_squares(backend):
    tensors = [*draw(0), torch.ones(4, 3, dtype=torch.float64).T]
    expected = sum((z * z).sum() for z in tensors)
    torch.testing.assert_close(sum_of_squares(tensors, backend=backend), expected)


def test_nothing_to_step():
    adamw_step([], [], [], [], [], **KNOBS)


def test_errors():
    p, g, m, v, steps = state(torch.float32)
    with pytest.raises(ValueError, match=r"adamw_step: got 2 gradients for 3 parameters"):
        adamw_step(p, g[:2], m, v, steps, **KNOBS)
    with pytest.raises(ValueError, match=r"means for 3 parameters, of other sizes at \[1, 2\]"):
        adamw_step(p, g, [m[0], m[2], m[1]], v, steps, **KNOBS)
    wide = [torch.ones(1, 3).T if z.numel() == 3 else z for z in g]
    turned = [torch.ones(6)[::2] if z.numel() == 3 else z for z in g]
    adamw_step(p, wide, m, v, steps, **KNOBS)
    with pytest.raises(ValueError, match=r"of equal sizes and contiguous"):
        adamw_step(p, turned, m, v, steps, **KNOBS)
    with pytest.raises(ValueError, match=r"adamw_step: got 1 steps for 3 parameters"):
        adamw_step(p, g, m, v, steps[:1], **KNOBS)
    with pytest.raises(ValueError, match=r"expected auto or one of triton, torch, reference"):
        adamw_step(p, g, m, v, steps, **KNOBS, backend="foreach")
    with pytest.raises(ValueError, match=r"adamw_step: got backend='triton', .*cuda, not cpu"):
        adamw_step(p, g, m, v, steps, **KNOBS, backend="triton")
    assert BACKENDS == ("triton", "torch", "reference")


def test_cost_is_that_of_the_tensors():
    p, g, m, v, _ = state(torch.float32)
    count = sum(z.numel() for z in p)
    found = cost(count)
    assert found.bytes_read == sum(z.nbytes for some in (p, g, m, v) for z in some)
    assert found.bytes_written == sum(z.nbytes for some in (p, m, v) for z in some)
    copied = cost(count, copies=True)
    assert copied.bytes_written - found.bytes_written == 2 * count
    assert norm_cost(count).bytes_read == sum(z.nbytes for z in g)
