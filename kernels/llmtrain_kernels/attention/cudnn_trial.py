"""A trial of every new plan of cuDNN: a few documents of random numbers, beside float64.

Plans are made by a library that is not the same on every machine, and that has been wrong without a
word: for gradients of views of one projection (9.19), from stale workspace (before 9.18). So none
is used that was not right here. A trial takes milliseconds, and a run sees two or three plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain_kernels.attention.cudnn_shapes import Key, operands

LENGTHS = (300, 1, 63)  # of documents, the others are empty; of at least 128 tokens in all
LIMIT = 4.0  # relative error, in steps of the dtype at 1; on an H200 bfloat16 has 0.5
GIVEN = {"q", "k", "v", "do"}


@torch.no_grad()
def trial(
    key: Key, run: Callable[[Key, dict[str, Tensor], Tensor], object], device: torch.device
) -> None:
    """run(key, tensors, cu_seqlens) executes a plan. RuntimeError when that of key is wrong; a
    backward plan gets what the forward one made, whose lse is cuDNN's own matter."""
    most = min(key.longest, key.tokens // 2) if key.backward else key.longest
    lengths = [min(length, most) for length in LENGTHS]
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    generator = torch.Generator(device).manual_seed(0)

    tensors = {}
    for name, x in operands(key).items():
        size = (1, int(ends[-1]), x.heads, x.width)
        made = torch.randn(size, generator=generator, device=device)
        if name == "q":  # scores of 1 at most, as a softmax that is all or nothing errs more
            made *= min(1.0, key.k_width**-0.5 / key.scale)
        tensors[name] = made.to(torch.float32 if name == "lse" else key.dtype)
    parts = [
        exact(key, {n: x[0, begin:end].double() for n, x in tensors.items() if n in GIVEN})
        for begin, end in itertools.pairwise(ends.tolist())
    ]
    expected = {name: torch.cat([part[name] for part in parts])[None] for name in parts[0]}
    for name in tensors.keys() - GIVEN:
        tensors[name].fill_(torch.nan)
    forward = key._replace(tokens=0)
    for tried in (forward, key) if key.backward else (forward,):
        given = {name: tensors[name] for name in operands(tried)}
        run(tried, given, ends.to(device, torch.int32))
    errors = {
        name: ((tensors[name].double() - expected[name]).norm() / expected[name].norm()).item()
        for name in (("dq", "dk", "dv") if key.backward else ("o",))
    }
    limit = LIMIT * torch.finfo(key.dtype).eps
    if not all(error <= limit for error in errors.values()):  # nan is not
        said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise RuntimeError(
            f"attention backend=cudnn: a plan of cuDNN {torch.backends.cudnn.version()} has "
            f"relative errors of {said} against float64, expected at most {limit:.1e}, for {key}; "
            "set mixer.backend=varlen, or take another version of cuDNN"
        )


def exact(key: Key, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results for one document: o_THV and, with do, dq, dk and dv. Written out, as no gradients are
    recorded within an operator."""
    shared = key.heads // key.groups
    q_THK = given["q"]
    k_THK, v_THV = (given[name].repeat_interleave(shared, dim=1) for name in ("k", "v"))
    scores_HTS = key.scale * torch.einsum("thk,shk->hts", q_THK, k_THK)
    if key.causal:
        hidden_TS = torch.ones_like(scores_HTS[0], dtype=torch.bool).triu(1)
        scores_HTS = scores_HTS.masked_fill(hidden_TS, -torch.inf)
    p_HTS = scores_HTS.softmax(-1)
    o_THV = torch.einsum("hts,shv->thv", p_HTS, v_THV)
    if "do" not in given:
        return {"o": o_THV}
    do_THV = given["do"]
    dp_HTS = torch.einsum("thv,shv->hts", do_THV, v_THV)
    ds_HTS = key.scale * p_HTS * (dp_HTS - (do_THV * o_THV).sum(-1).mT[..., None])
    dk_THK = torch.einsum("hts,thk->shk", ds_HTS, q_THK)
    dv_THV = torch.einsum("hts,thv->shv", p_HTS, do_THV)
    dk_TGK, dv_TGV = (x.unflatten(1, (-1, shared)).sum(2) for x in (dk_THK, dv_THV))
    dq_THK = torch.einsum("hts,shk->thk", ds_HTS, k_THK)
    return {"o": o_THV, "dq": dq_THK, "dk": dk_TGK, "dv": dv_TGV}
