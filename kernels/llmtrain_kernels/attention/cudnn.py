"""cuDNN's attention over packed documents, by NVIDIA's package nvidia-cudnn-frontend (optional).

Rows are flattened to one sequence of B*T tokens with boundaries cu_seqlens, as in varlen.py. On
Hopper cuDNN's kernels are 1.7 times as fast as the FlashAttention-2 ones that varlen.py takes, and
sdpa.py has them for dense rows. torch's own operator with boundaries builds its plan at every call
(42 ms); here plans are kept: cudnn_plan.py, which says how few they are. Build them before a CUDA
graph is captured, by running the step once.

Saved for the backward pass: q, k, v, o and, in float32, the log of the sums of the softmax (4 H
bytes a token). dq is a sum of atomic additions, in no fixed order.
"""

from __future__ import annotations

from importlib.util import find_spec
from operator import index

import torch
from einops import rearrange
from torch import Tensor

from llmtrain_kernels.attention import cudnn_plan
from llmtrain_kernels.attention.case import Case
from llmtrain_kernels.attention.sdpa import CUDNN_MAJORS

INSTALLED = find_spec("cudnn") is not None
LEAST_VERSION = 91800  # before it, backward passes on Hopper began from stale workspace
WIDTH_STEP, MOST_WIDTH = 16, 128  # of other widths, the backward pass takes N * S of workspace


def unsupported(case: Case) -> str | None:
    """Why this backend cannot run the case, or None."""
    if not INSTALLED:
        return "is not installed: pip install 'llmtrain[cudnn]'"
    if not case.half_cuda:
        return "needs bfloat16 or float16 on CUDA"
    if case.capability is not None and case.capability[0] not in CUDNN_MAJORS:
        majors = " or ".join(map(str, CUDNN_MAJORS))
        return f"needs compute capability {majors}, this device has {case.capability}"
    version = torch.backends.cudnn.version()
    if version is not None and version < LEAST_VERSION:
        least, got = (f"{v // 10000}.{v // 100 % 100}" for v in (LEAST_VERSION, version))
        return f"needs cuDNN {least}, torch has {got}"
    if case.softcap or case.cache or case.sinks or case.window is not None:
        return "has no window, sinks, softcap or cache"
    if not case.documents:
        return "is for packed documents; sdpa has cuDNN's kernels for dense rows"
    if not case.boundaries:
        return "needs cu_seqlens and max_seqlen for packed documents"
    if not all(w % WIDTH_STEP == 0 and w <= MOST_WIDTH for w in (case.k_width, case.v_width)):
        return (
            f"needs key and value widths of at most {MOST_WIDTH}, multiples of {WIDTH_STEP}, not "
            f"{case.k_width} and {case.v_width}"
        )
    if case.deterministic and case.training:
        return "has no deterministic backward pass"
    return None


@torch.library.custom_op("llmtrain::cudnn_attention", mutates_args=())
def forward(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    row: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(o_THV, lse_TH1). row: tokens of a row; longest and row bound the longest document."""
    q, k, v = (cudnn_plan.addressable(x) for x in (q_THK, k_TGK, v_TGV))
    key = cudnn_plan.make_key(q, k, v, cu_seqlens, longest, row, causal, scale, backward=False)
    o_THV, lse_TH1 = results(q_THK, v_TGV)
    tensors = {"q": q, "k": k, "v": v, "o": o_THV, "lse": lse_TH1}
    cudnn_plan.execute(key, tensors, cu_seqlens)
    return o_THV, lse_TH1


def results(q_THK: Tensor, v_TGV: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse), not filled."""
    tokens, heads, _ = q_THK.shape
    o_THV = q_THK.new_empty(tokens, heads, v_TGV.shape[2])
    return o_THV, q_THK.new_empty(tokens, heads, 1, dtype=torch.float32)


@forward.register_fake
def _(q_THK, k_TGK, v_TGV, cu_seqlens, longest, row, causal, scale):
    return results(q_THK, v_TGV)


@torch.library.custom_op("llmtrain::cudnn_attention_backward", mutates_args=())
def backward(
    do_THV: Tensor,
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGV: Tensor,
    o_THV: Tensor,
    lse_TH1: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    row: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_THK, dk_TGK, dv_TGV)"""
    q, k, v = (cudnn_plan.addressable(x) for x in (q_THK, k_TGK, v_TGV))
    key = cudnn_plan.make_key(q, k, v, cu_seqlens, longest, row, causal, scale, backward=True)
    do = cudnn_plan.addressable(do_THV)
    made = gradient_buffers(q_THK, k_TGK, v_TGV)
    tensors = {"q": q, "k": k, "v": v, "o": o_THV, "lse": lse_TH1, "do": do}
    tensors |= zip(("dq", "dk", "dv"), made)
    cudnn_plan.execute(key, tensors, cu_seqlens)
    return made


def gradient_buffers(*of: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in of)


@backward.register_fake
def _(do_THV, q_THK, k_TGK, v_TGV, o_THV, lse_TH1, cu_seqlens, longest, row, causal, scale):
    return gradient_buffers(q_THK, k_TGK, v_TGV)


def setup_context(ctx, inputs, output) -> None:
    *saved, longest, row, causal, scale = inputs
    o_THV, lse_TH1 = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse_TH1)
    ctx.how = longest, row, causal, scale
    *qkv, cu_seqlens = saved
    ctx.save_for_backward(*qkv, o_THV, lse_TH1, cu_seqlens)


def gradients(ctx, do_THV, _):
    found = (None,) * 3 if do_THV is None else backward(do_THV, *ctx.saved_tensors, *ctx.how)
    return *found, *([None] * 5)


forward.register_autograd(gradients, setup_context=setup_context)


def run(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    scale: float | None = None,
    doc_ids_BT: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    q_positions_BT: Tensor | None = None,
    k_positions_BS: Tensor | None = None,
) -> Tensor:
    """o_BTHV. Arguments as attention(); doc_ids_BT repeats cu_seqlens, the others are not taken."""
    o_THV, _ = forward(
        rearrange(q_BTHK, "b t h k -> (b t) h k"),
        rearrange(k_BSGK, "b s g k -> (b s) g k"),
        rearrange(v_BSGV, "b s g v -> (b s) g v"),
        cu_seqlens,
        max_seqlen,
        q_BTHK.shape[1],
        causal,
        index(q_BTHK.shape[3]) ** -0.5 if scale is None else scale,
    )
    return rearrange(o_THV, "(b t) h v -> b t h v", b=q_BTHK.shape[0])
