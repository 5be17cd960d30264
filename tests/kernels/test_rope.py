"""Rotary embedding of queries and keys: definition, formula of the CPU, what does not fit, cost."""

import inspect
import logging

import pytest
import torch
from llmtrain_kernels import triton_backend
from llmtrain_kernels.rope import cost, reference, rope, select_backend
from torch.utils.flop_counter import FlopCounterMode

B, T, H, G, K = 2, 5, 4, 2, 12


def random(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(half=K // 2, *, dtype=torch.float64, angles=torch.float32, scale=1.0):
    """q, k, cos, sin."""
    theta = 10 * random(B, T, half, seed=2)
    angles = [(scale * z).to(angles) for z in (theta.cos(), theta.sin())]
    q, k = (random(B, T, heads, K, seed=i, dtype=dtype) for i, heads in enumerate((H, G)))
    return [q, k, *angles]


def test_reference_has_the_arguments():
    expected = inspect.signature(rope).parameters
    plain = [p for name, p in expected.items() if name != "backend"]
    assert list(inspect.signature(reference).parameters.values()) == plain


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("half", "part"), [(6, None), (2, None), (2, 4), (2, 7), (6, 12)])
def test_pairs_are_complex_numbers(half, part, interleaved, backend):
    q, k, cos, sin = inputs(half, angles=torch.float64, scale=1.3)
    start = 0 if part is None else K - part
    for x, got in zip((q, k), rope(q, k, cos, sin, interleaved=interleaved, part=part)):
        pairs = x[..., start : start + 2 * half]
        if interleaved:
            numbers = torch.complex(pairs[..., ::2], pairs[..., 1::2])
        else:
            numbers = torch.complex(pairs[..., :half], pairs[..., half:])
        turned = numbers * torch.complex(cos, sin)[:, :, None]
        expected = x.clone()
        if interleaved:
            expected[..., start : start + 2 * half] = torch.view_as_real(turned).flatten(-2)
        else:
            both = torch.cat([turned.real, turned.imag], dim=-1)
            expected[..., start : start + 2 * half] = both
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
def test_backends_agree(interleaved):
    """Bit for bit, keys or none, angles for all rows or for each."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        q, k, cos, sin = inputs(4, dtype=dtype)
        for keys in (k, None):
            for angles in ((cos, sin), (cos[:1], sin[:1])):
                how = {"interleaved": interleaved, "part": 9}
                expected = rope(q, keys, *angles, backend="reference", **how)
                got = rope(q, keys, *angles, **how)
                assert got[0].equal(expected[0])
                assert (got[1] is None) if keys is None else got[1].equal(expected[1])


def test_gradients_of_the_reference():
    q, k, cos, sin = inputs(4)
    leaves = [z.requires_grad_() for z in (q, k)]

    def run(q, k):
        return reference(q, k, cos, sin, part=10)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_heads_of_other_width_share_the_angles(backend):
    """Latent attention: one key part for all heads, queries that turn at their end."""
    q, k, cos, sin = inputs(2)
    narrow = k[:, :, :1, :4]
    how = {"part": 4, "backend": backend}
    got_q, got_k = rope(q, narrow, cos, sin, **how)
    assert got_q.equal(rope(q, None, cos, sin, **how)[0])
    assert got_k.equal(rope(narrow, None, cos, sin, backend=backend)[0])
    assert got_q[..., :8].equal(q[..., :8])


def test_what_does_not_fit():
    q, k, cos, sin = inputs()
    with pytest.raises(ValueError, match=r"got cos \(2, 4, 6\).*expected both \[2 or 1, 5, R"):
        rope(q, k, cos[:, :4], sin)
    with pytest.raises(ValueError, match="a width of 12, expected at most the head's 8; set the"):
        rope(q, k[..., :8], cos, sin)
    with pytest.raises(ValueError, match="a width of 12, expected at most the head's 8; set the"):
        rope(q, k, cos, sin, part=8)
    with pytest.raises(ValueError, match="rope: got part=13, expected at most the head's 12"):
        rope(q, k, cos, sin, part=13)
    with pytest.raises(ValueError, match="expected the same rows, tokens and dtype; give keys"):
        rope(q, k.float(), cos, sin)
    with pytest.raises(ValueError, match="expected the same rows, tokens and dtype; give keys"):
        rope(q, k[:, :4], cos, sin)
    with pytest.raises(ValueError, match="angles that require gradients, expected constants"):
        rope(q, k, cos.requires_grad_(), sin)
    with pytest.raises(ValueError, match="rope: got backend='cuda', expected auto or one of"):
        rope(q, k, cos.detach(), sin, backend="cuda")


def test_a_backend_that_cannot_run():
    q, k, cos, sin = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"rope: got backend='triton'.*run on cuda, not cpu; set"):
        rope(q, k, cos, sin, backend="triton")
    with pytest.raises(ValueError, match=r"they take angles in float32, not bfloat16"):
        select_backend("triton", "cuda", torch.bfloat16, torch.bfloat16)


def test_choice_is_logged_once(caplog):
    triton_backend.automatic.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert select_backend("auto", "cpu", torch.bfloat16, torch.float32) == "torch"
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.skipif(not triton_backend.HAS_TRITON, reason="no triton")
def test_a_gpu_runs_triton():
    assert select_backend("auto", "cuda", torch.bfloat16, torch.float32) == "triton"
    assert select_backend("auto", "cuda", torch.float64, torch.float32) == "torch"


def test_one_graph():
    q, k, cos, sin = inputs(dtype=torch.float32)
    compiled = torch.compile(rope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, cos, sin), rope(q, k, cos, sin))


@pytest.mark.parametrize("rows", [1, B])
def test_cost_is_what_goes_in_and_out(rows):
    q, k, cos, sin = inputs(4, dtype=torch.bfloat16)
    leaves = [z.requires_grad_() for z in (q, k[..., :9].detach())]
    angles = cos[:rows], sin[:rows]
    with FlopCounterMode(display=False) as counter:
        made = reference(*leaves, *angles)
        torch.autograd.grad(made, leaves, [torch.ones_like(z) for z in made])
    sizes = {"heads": H, "kv_heads": G, "k_width": K, "kv_width": 9, "turned": 8}
    both = cost(B * T, **sizes, dtype=q.dtype, angles=rows * T)
    moved = sum(z.nbytes for z in leaves)
    for direction in both:
        assert direction.flops == counter.get_total_flops() == 0
        assert direction.bytes_written == moved
        assert direction.bytes_read == moved + sum(z.nbytes for z in angles)
    assert both[0].saved_bytes == sum(z.nbytes for z in angles)
