"""The mLSTM recurrence: a matrix memory with exponential or sigmoid input gates.

    C_t = f'_t C_{t-1} + i'_t k_t v_t^T        n_t = f'_t n_{t-1} + i'_t k_t
    h_t = C_t^T q_t / (max(|n_t . q_t|, exp(-m_t)) + eps)              q scaled by 1 / sqrt(K)
    m_t = max(log f_t + m_{t-1}, i_t)          the stabiliser; f_t = sigmoid of its pre-activation
    f'_t = exp(log f_t + m_{t-1} - m_t)        i'_t = exp(i_t - m_t)

Beck et al. 2024, arXiv:2405.04517, eq. 19-27 and its appendix on the stabiliser; eps and exp(-m)
as in xLSTM-7B (Beck et al. 2025, arXiv:2503.13427). Before the first token C = n = m = 0.
input_gate="sigmoid" (Beck et al. 2025, arXiv:2503.14376): i'_t = sigmoid(i_t) and f'_t = f_t are
bounded: no stabiliser and no normaliser, h_t = C_t^T q_t; the block's norm follows.

Chunked form, on scalar_decay:

    1. m by a scan in log2(T) steps (max and plus are associative)
    2. gates g_t = log f_t + m_{t-1} - m_t <= 0, keys k_t exp(i_t - m_t)
    3. scalar_decay of values with a column of ones: its output is numerator and denominator

m cancels from C / n: any number near the largest exponent serves. So steps 2 and 3 take it as a
constant, and the gradient that it does have, through eps and the returned state, is put where these
are: autograd would reach the same sum by way of large terms that cancel.

FLOPs a token and head: 2 K V for k v^T, 2 K V for C^T q, 2 K for n . q (exponential gates only).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain_kernels.checks import check_backend, check_choice, check_state
from llmtrain_kernels.cost import Cost
from llmtrain_kernels.scalar_decay import scalar_decay

BACKENDS = ("chunked", "reference")
INPUT_GATES = ("exp", "sigmoid")
# What is left of a memory after exp(-1e4) is zero in float64 too; the floor keeps sums of gates
# finite for any pre-activation.
LOG_FORGET_FLOOR = -1e4
# exp(-m) is kept between these powers: finite with its square in float32, and where they bind it
# does not show. Above m = 36 the memory was written to with weight 1, and exp(-36) is float64's
# rounding of that (what scalar_decay leaves of a memory that decayed to nothing is less); below
# m = -60 the output is nothing.
FLOOR_EXPONENTS = (-36.0, 60.0)


def log_forget(f_BTH: Tensor) -> Tensor:
    """Log forget gate of a pre-activation."""
    return F.logsigmoid(f_BTH).clamp(min=LOG_FORGET_FLOOR)


def denominator_floor(m: Tensor) -> Tensor:
    """exp(-m), kept finite."""
    return (-m).clamp(*FLOOR_EXPONENTS).exp()


def reference(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    *,
    input_gate: str = "exp",
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: tuple[Tensor, ...] | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The definition, one token after the other. Arguments as mlstm()."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    batch, tokens, heads, k_width = q_BTHK.shape
    scale = k_width**-0.5 if scale is None else scale
    log_f_BTH = log_forget(f_BTH.to(dtype))
    inputs = (scale * q_BTHK.to(dtype), k_BTHK.to(dtype), v_BTHV.to(dtype), i_BTH.to(dtype))
    if initial_state is None:
        C_BHKV = inputs[0].new_zeros(batch, heads, k_width, v_BTHV.shape[3])
        state = (C_BHKV, C_BHKV[..., 0], C_BHKV[..., 0, 0])[: 3 if input_gate == "exp" else 1]
    else:
        state = tuple(z.to(dtype) for z in initial_state)
    outputs = []
    for t in range(tokens):
        if doc_ids_BT is not None and t > 0:
            starts_B = doc_ids_BT[:, t] != doc_ids_BT[:, t - 1]
            state = tuple(torch.where(starts_B.view(-1, *[1] * (z.dim() - 1)), 0, z) for z in state)
        token = [z[:, t] for z in (*inputs, log_f_BTH)]
        if input_gate == "exp":
            h_BHV, state = exponential_step(*token, *state, eps)
        else:
            h_BHV, state = sigmoid_step(*token, *state)
        outputs.append(h_BHV)
    h_BTHV = torch.stack(outputs, dim=1).to(v_BTHV.dtype)
    return h_BTHV, state if return_state else None


def exponential_step(
    q_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    i_BH: Tensor,
    log_f_BH: Tensor,
    C_BHKV: Tensor,
    n_BHK: Tensor,
    m_BH: Tensor,
    eps: float,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """One token, q scaled: h_BHV and (C, n, m)."""
    new_m_BH = torch.maximum(log_f_BH + m_BH, i_BH)
    # the difference of two m first: either may be far larger than log f
    f_BH1 = (log_f_BH + (m_BH - new_m_BH)).exp()[..., None]
    i_BH1 = (i_BH - new_m_BH).exp()[..., None]
    C_BHKV = f_BH1[..., None] * C_BHKV + i_BH1[..., None] * (k_BHK[..., None] @ v_BHV[:, :, None])
    n_BHK = f_BH1 * n_BHK + i_BH1 * k_BHK
    h_BHV = (q_BHK[:, :, None] @ C_BHKV)[:, :, 0]
    n_q_BH1 = (q_BHK[:, :, None] @ n_BHK[..., None])[:, :, 0]
    below_BH1 = torch.maximum(n_q_BH1.abs(), denominator_floor(new_m_BH)[..., None])
    return h_BHV / (below_BH1 + eps), (C_BHKV, n_BHK, new_m_BH)


def sigmoid_step(
    q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, i_BH: Tensor, log_f_BH: Tensor, C_BHKV: Tensor
) -> tuple[Tensor, tuple[Tensor]]:
    """One token, q scaled: h_BHV and (C,)."""
    i_BH11, f_BH11 = i_BH.sigmoid()[..., None, None], log_f_BH.exp()[..., None, None]
    C_BHKV = f_BH11 * C_BHKV + i_BH11 * (k_BHK[..., None] @ v_BHV[:, :, None])
    return (q_BHK[:, :, None] @ C_BHKV)[:, :, 0], (C_BHKV,)


class MaxPlusScan(torch.autograd.Function):
    """m_t = max(a_t + m_{t-1}, b_t) along dim 1, m_{-1} = m0; at a start m_{t-1} is 0.

    a_BTH, b_BTH, m0_BH, starts_BT (bool or None). Forward in log2(T) steps over pairs (a, b), which
    compose as (a1, b1) then (a2, b2) = (a1 + a2, max(a2 + b1, b2)); a start is b = max(a, b) with
    a = -inf. Backward: what reaches m_t reaches the b that it was made of and every a since.
    """

    @staticmethod
    def forward(ctx, a_BTH, b_BTH, m0_BH, starts_BT):
        tokens = a_BTH.shape[1]
        sum_BTH = a_BTH
        m_BTH = torch.cat(
            [torch.maximum(b_BTH[:, :1], a_BTH[:, :1] + m0_BH[:, None]), b_BTH[:, 1:]], 1
        )
        if starts_BT is not None:
            m_BTH = torch.where(starts_BT[..., None], torch.maximum(a_BTH, b_BTH), m_BTH)
            sum_BTH = torch.where(starts_BT[..., None], float("-inf"), a_BTH)
        reach = 1
        while reach < tokens:
            joined_BTH = torch.maximum(sum_BTH[:, reach:] + m_BTH[:, :-reach], m_BTH[:, reach:])
            m_BTH = torch.cat([m_BTH[:, :reach], joined_BTH], dim=1)
            longer_BTH = sum_BTH[:, reach:] + sum_BTH[:, :-reach]
            sum_BTH = torch.cat([sum_BTH[:, :reach], longer_BTH], dim=1)
            reach *= 2
        before_BTH = shifted(m_BTH, m0_BH, starts_BT)
        ctx.save_for_backward(a_BTH + before_BTH > b_BTH, starts_BT)
        return m_BTH

    @staticmethod
    def backward(ctx, dm_BTH):
        carried_BTH, starts_BT = ctx.saved_tensors
        tokens = dm_BTH.shape[1]
        linked_BTH = carried_BTH if starts_BT is None else carried_BTH & ~starts_BT[..., None]
        # the token before which the chain that t belongs to ends: the next one that is not linked
        index_T1 = torch.arange(tokens, device=dm_BTH.device)[:, None]
        breaks_BTH = F.pad(torch.where(linked_BTH, tokens, index_T1), (0, 0, 0, 1), value=tokens)
        end_BTH = breaks_BTH[:, 1:].flip(1).cummin(dim=1).values.flip(1)
        sums_BTH = F.pad(dm_BTH.flip(1).cumsum(dim=1).flip(1), (0, 0, 0, 1))
        chain_BTH = sums_BTH[:, :-1] - sums_BTH.gather(1, end_BTH)
        da_BTH = torch.where(carried_BTH, chain_BTH, 0)
        return da_BTH, chain_BTH - da_BTH, torch.where(linked_BTH[:, 0], chain_BTH[:, 0], 0), None


def shifted(m_BTH: Tensor, m0_BH: Tensor, starts_BT: Tensor | None) -> Tensor:
    """m of the token before; 0 before a document."""
    before_BTH = torch.cat([m0_BH[:, None], m_BTH[:, :-1]], dim=1)
    return before_BTH if starts_BT is None else torch.where(starts_BT[..., None], 0, before_BTH)


def document_starts(doc_ids_BT: Tensor | None) -> Tensor | None:
    """True at the first token of a document."""
    if doc_ids_BT is None:
        return None
    return F.pad(doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1], (1, 0), value=True)


def chunked(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    *,
    input_gate: str = "exp",
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: tuple[Tensor, ...] | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
    chunk: int = 64,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """The steps of the module's docstring. Arguments as mlstm()."""
    dtype = torch.promote_types(v_BTHV.dtype, torch.float32)
    i_BTH, log_f_BTH = i_BTH.to(dtype), log_forget(f_BTH.to(dtype))
    rest = {"scale": scale, "doc_ids_BT": doc_ids_BT, "return_state": return_state, "chunk": chunk}
    if input_gate == "sigmoid":  # steps 1 and 2 are the gates themselves
        keys_BTHK = (k_BTHK * i_BTH.sigmoid()[..., None]).to(k_BTHK.dtype)
        start = None if initial_state is None else initial_state[0]
        h_BTHV, C_BHKV = scalar_decay(
            q_BTHK, keys_BTHK, v_BTHV, log_f_BTH, initial_state_BHKV=start, **rest
        )
        return h_BTHV, None if C_BHKV is None else (C_BHKV,)
    return exponential_chunks(q_BTHK, k_BTHK, v_BTHV, i_BTH, log_f_BTH, eps, initial_state, **rest)


def exponential_chunks(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    log_f_BTH: Tensor,
    eps: float,
    initial_state: tuple[Tensor, ...] | None,
    *,
    scale: float | None,
    doc_ids_BT: Tensor | None,
    return_state: bool,
    chunk: int,
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """Exponential input gates. i_BTH, log_f_BTH: float32 or float64."""
    # 1. the stabiliser
    starts_BT, width = document_starts(doc_ids_BT), v_BTHV.shape[3]
    m0_BH = torch.zeros_like(i_BTH[:, 0]) if initial_state is None else initial_state[2].to(i_BTH)
    m_BTH = MaxPlusScan.apply(log_f_BTH, i_BTH, m0_BH, starts_BT)
    fixed_m_BTH = m_BTH.detach()
    # 2. gates and keys; the difference of two m first, as either may be far larger than log f
    g_BTH = log_f_BTH + (shifted(fixed_m_BTH, m0_BH, starts_BT) - fixed_m_BTH)
    keys_BTHK = (k_BTHK * (i_BTH - fixed_m_BTH).exp()[..., None]).to(k_BTHK.dtype)
    # 3. numerator and denominator; zeros fill up the column of ones, as matrix products of widths
    # that are no multiple of 8 are slow on a GPU
    column = (torch.arange(8 - width % 8, device=v_BTHV.device) == 0).to(v_BTHV.dtype)
    values_BTHV = torch.cat([v_BTHV, column.expand(*v_BTHV.shape[:3], -1)], dim=-1)
    start = None
    if initial_state is not None:
        start = torch.cat([initial_state[0], initial_state[1][..., None]], dim=-1)
        start = F.pad(start, (0, len(column) - 1))
    o_BTHV, state_BHKV = scalar_decay(
        q_BTHK,
        keys_BTHK,
        values_BTHV,
        g_BTH,
        scale=scale,
        initial_state_BHKV=start,
        doc_ids_BT=doc_ids_BT,
        return_state=return_state,
        chunk=chunk,
    )
    n_q_BTH = o_BTHV[..., width].to(g_BTH.dtype)
    below_BTH = torch.maximum(n_q_BTH.abs(), denominator_floor(fixed_m_BTH))
    # eps stands beside quantities that were divided by exp(m): the gradient of m
    below_BTH = below_BTH + eps * (m_BTH - fixed_m_BTH).exp()
    h_BTHV = (o_BTHV[..., :width] / below_BTH[..., None]).to(v_BTHV.dtype)
    if not return_state:
        return h_BTHV, None
    state_BHKV = state_BHKV * (fixed_m_BTH - m_BTH)[:, -1, :, None, None].exp()
    return h_BTHV, (state_BHKV[..., :width], state_BHKV[..., width], m_BTH[:, -1])


def mlstm(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    *,
    input_gate: str = "exp",
    scale: float | None = None,
    eps: float = 1e-6,
    initial_state: tuple[Tensor, ...] | None = None,
    doc_ids_BT: Tensor | None = None,
    return_state: bool = False,
    chunk: int = 64,
    backend: str = "auto",
) -> tuple[Tensor, tuple[Tensor, ...] | None]:
    """(h_BTHV in v's dtype, the state after the last token or None).

    i_BTH, f_BTH: pre-activations of the input and forget gates, of any finite size; best float32.
    input_gate: "exp" or "sigmoid". scale: 1 / sqrt(K) if None. eps: beside the denominator.
    initial_state, and the one returned: (C [B, H, K, V], n [B, H, K], m [B, H]), or (C,) with
    sigmoid gates; float32 (float64); None is zeros.
    doc_ids_BT: integers >= 0 that never fall along a row; a new one starts from the zero state.
    chunk: tokens of a chunk. backend: auto (chunked; reference for one token) | chunked |
    reference. ValueError for arguments that do not fit together.
    """
    check(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, input_gate, initial_state, doc_ids_BT, backend)
    arguments = {
        "input_gate": input_gate,
        "scale": scale,
        "eps": eps,
        "initial_state": initial_state,
        "doc_ids_BT": doc_ids_BT,
        "return_state": return_state,
    }
    if backend == "reference" or (backend == "auto" and v_BTHV.shape[1] == 1):
        return reference(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, **arguments)
    return chunked(q_BTHK, k_BTHK, v_BTHV, i_BTH, f_BTH, chunk=chunk, **arguments)


def check(
    q_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    i_BTH: Tensor,
    f_BTH: Tensor,
    input_gate: str,
    initial_state: tuple[Tensor, ...] | None,
    doc_ids_BT: Tensor | None,
    backend: str,
) -> None:
    """ValueError when the arguments of mlstm() do not fit together."""
    check_backend("mlstm", backend, BACKENDS)
    check_choice("mlstm", "input_gate", input_gate, INPUT_GATES)
    batch, tokens, heads, k_width = q_BTHK.shape
    rows = (batch, tokens, heads)
    if k_BTHK.shape != q_BTHK.shape or not (v_BTHV.shape[:3] == i_BTH.shape == f_BTH.shape == rows):
        raise ValueError(
            f"mlstm: got q {tuple(q_BTHK.shape)}, k {tuple(k_BTHK.shape)}, v "
            f"{tuple(v_BTHV.shape)}, i {tuple(i_BTH.shape)} and f {tuple(f_BTH.shape)}, expected "
            "the same rows, tokens and heads, and keys as wide as queries; give tensors of the "
            "same tokens and heads"
        )
    shapes = [(batch, heads, k_width, v_BTHV.shape[3]), (batch, heads, k_width), (batch, heads)]
    shapes = shapes if input_gate == "exp" else shapes[:1]
    check_state("mlstm", initial_state, shapes, doc_ids_BT)


def cost(
    tokens: int,
    *,
    heads: int,
    k_width: int,
    v_width: int,
    dtype: torch.dtype,
    input_gate: str = "exp",
) -> tuple[Cost, Cost]:
    """(forward, backward) of so many tokens (B T), of the recurrence itself.

    Backward: a product for each of the gradients of q, k, v and the memory, hence twice the FLOPs.
    """
    size = dtype.itemsize
    qk_bytes = 2 * tokens * heads * k_width * size
    v_bytes = tokens * heads * v_width * size
    gate_bytes = 2 * tokens * heads * torch.promote_types(dtype, torch.float32).itemsize
    normaliser = 2.0 * k_width if input_gate == "exp" else 0.0
    forward = Cost(
        flops=tokens * heads * (4.0 * k_width * v_width + normaliser),
        bytes_read=qk_bytes + v_bytes + gate_bytes,
        bytes_written=v_bytes,
        saved_bytes=qk_bytes + v_bytes + gate_bytes,
    )
    backward = Cost(
        flops=2 * forward.flops,
        bytes_read=qk_bytes + 2 * v_bytes + gate_bytes,  # v and the output's gradient
        bytes_written=qk_bytes + v_bytes + gate_bytes,
    )
    return forward, backward
