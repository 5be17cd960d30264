"""What stands for cuDNN's plans where there is no GPU: every document of every tensor is found by
the offsets and strides that a plan is told, and computed."""

import torch
from llmtrain_kernels.attention import attention, cudnn_shapes, cudnn_trial

GIVEN = cudnn_trial.GIVEN
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def documents(lengths, rows, empty=0):
    """The arguments that describe packed rows; `empty` documents follow the others."""
    lengths = torch.tensor(lengths)
    total = int(lengths.sum())
    ends = lengths.cumsum(0)
    ids = torch.bucketize(torch.arange(total), ends, right=True)
    boundaries = torch.cat([torch.zeros(1), ends, ends[-1:].expand(empty)])
    return {
        "doc_ids_BT": ids.view(rows, -1),
        "cu_seqlens": boundaries.int(),
        "max_seqlen": total // rows,
    }


def inputs(rows, tokens, heads, groups, k_width=16, v_width=None, *, projection=False):
    """q, k, v in float64. projection: they are views of one tensor."""
    generator = torch.Generator().manual_seed(0)
    v_width = v_width or k_width

    def noise(n, width):
        size = (rows, tokens, n, width)
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if projection:
        return noise(heads + 2 * groups, k_width).split([heads, groups, groups], dim=2)
    return noise(heads, k_width), noise(groups, k_width), noise(groups, v_width)


def with_gradients(call, qkv, **arguments):
    """[o, dq, dk, dv] for a random gradient of o."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    o = call(*leaves, **arguments)
    generator = torch.Generator().manual_seed(9)
    do = torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)
    return [o, *torch.autograd.grad(o, leaves, do)]


def by_reference(q, k, v, **arguments):
    return attention(q, k, v, backend="reference", **arguments)


def stand_in(key, tensors, cu_seqlens, numbers=None):
    """What execute() does, by documents."""
    found = cudnn_shapes.operands(key)
    assert list(tensors) == list(found)
    own = [name for name in found if name not in cudnn_shapes.OFFSET_OF]
    strides = torch.tensor([[found[name].token_stride] for name in own])
    made_anew = cudnn_shapes.ragged(cu_seqlens, key.documents, strides)
    numbers = made_anew if numbers is None else numbers
    torch.testing.assert_close(numbers, made_anew, rtol=0, atol=0)
    *offsets, lengths, _ = (x.tolist() for x in numbers)
    begin = dict(zip(own, offsets))

    def part(name, n):
        x, tensor = found[name], tensors[name]
        offset = tensor.storage_offset() + begin[cudnn_shapes.OFFSET_OF.get(name, name)][n]
        size, stride = (lengths[n], x.heads, x.width), (x.token_stride, x.width, 1)
        return tensor.as_strided(size, stride, offset)

    for n, length in enumerate(lengths):
        assert length <= key.longest
        if length == 0:
            continue
        given = {name: part(name, n) for name in found}
        made = cudnn_trial.exact(key, {name: given[name] for name in found if name in GIVEN})
        made["lse"] = made["o"].float().norm(dim=-1, keepdim=True)  # something to be known again
        if key.backward:
            for name in ("o", "lse"):
                close = EXACT if given[name].dtype == torch.float64 else {}
                torch.testing.assert_close(given[name], made[name], **close)
        for name in ("dq", "dk", "dv") if key.backward else ("o", "lse"):
            given[name].copy_(made[name])
    return numbers
