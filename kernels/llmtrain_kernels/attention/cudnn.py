"""cuDNN's attention over packed documents, by NVIDIA's package nvidia-cudnn-frontend (optional).

Plans see the rows as one sequence of B*T tokens with boundaries cu_seqlens, as in varlen.py. On
Hopper cuDNN's kernels are 1.7 times as fast as the FlashAttention-2 ones that varlen.py takes, and
sdpa.py has them for dense rows. torch's own operator with boundaries builds its plan at every call
(42 ms, pytorch#191576); here plans are kept: cudnn_plan.py, which says how few they are. Build them
before a CUDA graph is captured, by running the step once.

Saved for the backward pass: q, k, v (of views, the copies that the plan reads), o and, in float32,
the log of the sums of the softmax (4 H bytes a token). dq is a sum of atomic additions, in no fixed
order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from operator import index

import torch
from torch import Tensor

from llmtrain_kernels.attention import cudnn_plan, cudnn_shapes
from llmtrain_kernels.attention.case import Case
from llmtrain_kernels.attention.cudnn_shapes import Numbers
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


def attend(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[tuple[Tensor, Tensor], Numbers]:
    """((o_BTHV, lse_BTH1), numbers for attend_backward()). longest bounds the longest document, as
    a row does."""
    q, k, v = (cudnn_shapes.addressable(x) for x in (q_BTHK, k_BTGK, v_BTGV))
    key = cudnn_shapes.make_key(q, k, v, cu_seqlens, longest, causal, scale, backward=False)
    o_BTHV, lse_BTH1 = results(q, v)
    tensors = {"q": q, "k": k, "v": v, "o": o_BTHV, "lse": lse_BTH1}
    return (o_BTHV, lse_BTH1), cudnn_plan.execute(key, tensors, cu_seqlens)


def results(q_BTHK: Tensor, v_BTGV: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse), not filled."""
    heads = q_BTHK.shape[:3]
    o_BTHV = q_BTHK.new_empty(*heads, v_BTGV.shape[3])
    return o_BTHV, q_BTHK.new_empty(*heads, 1, dtype=torch.float32)


def attend_backward(
    do_BTHV: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    o_BTHV: Tensor,
    lse_BTH1: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    numbers: Numbers | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq_BTHK, dk_BTGK, dv_BTGV). numbers: those of attend(); None makes them anew."""
    q, k, v, do = (cudnn_shapes.addressable(x) for x in (q_BTHK, k_BTGK, v_BTGV, do_BTHV))
    key = cudnn_shapes.make_key(q, k, v, cu_seqlens, longest, causal, scale, backward=True)
    made = gradient_buffers(q, k, v)
    tensors = {"q": q, "k": k, "v": v, "o": o_BTHV, "lse": lse_BTH1, "do": do}
    tensors |= zip(("dq", "dk", "dv"), made)
    cudnn_plan.execute(key, tensors, cu_seqlens, numbers)
    return made


def gradient_buffers(*of: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in of)


@torch.library.custom_op("llmtrain::cudnn_attention", mutates_args=())
def forward(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return attend(q_BTHK, k_BTGK, v_BTGV, cu_seqlens, longest, causal, scale)[0]


@forward.register_fake
def _(q_BTHK, k_BTGK, v_BTGV, cu_seqlens, longest, causal, scale):
    return results(q_BTHK, v_BTGV)


@torch.library.custom_op("llmtrain::cudnn_attention_backward", mutates_args=())
def backward(
    do_BTHV: Tensor,
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGV: Tensor,
    o_BTHV: Tensor,
    lse_BTH1: Tensor,
    cu_seqlens: Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    saved = q_BTHK, k_BTGK, v_BTGV, o_BTHV, lse_BTH1, cu_seqlens
    return attend_backward(do_BTHV, *saved, longest, causal, scale)


@backward.register_fake
def _(do_BTHV, q_BTHK, k_BTGK, v_BTGV, o_BTHV, lse_BTH1, cu_seqlens, longest, causal, scale):
    return gradient_buffers(q_BTHK, k_BTGK, v_BTGV)


def setup_context(ctx, inputs, output) -> None:
    *qkv, cu_seqlens, longest, causal, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.how = longest, causal, scale
    ctx.save_for_backward(*qkv, *output, cu_seqlens)


def gradients(take: Callable[..., tuple[Tensor, ...]], ctx, do_BTHV, _):
    """take: what takes backward()'s arguments."""
    found = (None,) * 3 if do_BTHV is None else take(do_BTHV, *ctx.saved_tensors, *ctx.how)
    return *found, None, None, None, None


forward.register_autograd(functools.partial(gradients, backward), setup_context=setup_context)


class Attended(torch.autograd.Function):
    """forward() for calls that nothing traces: of a call's time on the host the operators' layers,
    which are Python, took more than half. The backward pass gets copies and numbers that the
    operators make anew."""

    @staticmethod
    def forward(ctx, q_BTHK, k_BTGK, v_BTGV, *how):
        inputs = *(cudnn_shapes.addressable(x) for x in (q_BTHK, k_BTGK, v_BTGV)), *how
        output, numbers = attend(*inputs)
        setup_context(ctx, inputs, output)
        ctx.how = *ctx.how, numbers
        return output

    @staticmethod
    def backward(ctx, *given):
        if torch.is_grad_enabled():  # create_graph: saved copies would hide that this has none
            raise RuntimeError(
                "attention backend=cudnn: got a gradient to differentiate (create_graph=True), "
                "expected none, since it has no second derivatives; set mixer.backend=reference"
            )
        return gradients(attend_backward, ctx, *given)


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
    scale = index(q_BTHK.shape[3]) ** -0.5 if scale is None else scale
    call = forward if torch.compiler.is_compiling() else Attended.apply
    o_BTHV, _ = call(q_BTHK, k_BSGK, v_BSGV, cu_seqlens, max_seqlen, causal, scale)
    return o_BTHV
