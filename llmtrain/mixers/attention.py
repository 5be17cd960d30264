"""Softmax attention: multi-head, multi-query and grouped-query, with an optional sliding window.

    q_t = W_q x_t   k_t = W_k x_t   v_t = W_v x_t      split into H query heads and G groups
    o_t = sum_{j <= t} softmax_j(scale q_t . k_j) v_j   j in t's document, t - j < window
    y_t = W_o o_t

Vaswani et al. 2017 (arXiv:1706.03762); G = 1: Shazeer 2019 (arXiv:1911.02150); 1 < G < H: Ainslie
et al. 2023 (arXiv:2305.13245); window: Beltagy et al. 2020 (arXiv:2004.05150). Options:

    qk_norm      an RMSNorm with a gain per channel over each head of q and k, before rotation
                 (Dehghani et al. 2023, arXiv:2302.05442)
    output_gate  y_t = W_o (o_t * sigmoid(W_g x_t)), a gate per channel of a head (Qiu et al. 2025,
                 arXiv:2505.06708; Qwen3-Next); W_g's rows of a head follow W_q's in q_proj
    softcap c    scores are c tanh(scale q_t . k_j / c) (Gemma 2, arXiv:2408.00118, section 2)
    sinks s      beside its window a token sees the first s tokens of its document (Xiao et al.
                 2023, arXiv:2309.17453, who count positions inside the cache; here they are real)

Parameters: D (2 H + 2 G) K, and D H K for the gate. FLOPs a token: 2 per weight, and 4 H K for each
key that it sees: on average (T + 1) / 2 of them, fewer with a window. State: the keys and values of
the first s and the last min(max_tokens - s, window) tokens; position p lies in slot p if p < s,
else in slot s + (p - s) mod (S - s).
"""

from __future__ import annotations

import torch
from einops import rearrange
from llmtrain_kernels.attention import (
    BACKENDS,
    Case,
    attention,
    select_backend,
    visible_pairs,
)
from torch import Tensor

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.mixers.checks import check_backend
from llmtrain.model.init import depth_std
from llmtrain.model.linear import Linear, linears
from llmtrain.model.norm import RMSNorm
from llmtrain.model.position import apply_rotary


class Attention(Mixer):
    """n_kv_heads: groups G, None for one a head. head_dim: K, None for d_model / n_heads.

    d_input: width of the input, None for d_model; the output has d_model. window: keys a token
    sees, itself included; None for all before it. softmax_scale: None for 1 / sqrt(K). qk_norm_eps
    and qk_norm_zero_centered: of the two norms. bias: of all four projections, qk_bias: of those to
    queries and keys alone. backend: of llmtrain_kernels.attention, for
    training and prefill; a cache is read by the one that can, unless it is "reference".
    """

    uses_positions = True

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        d_input: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        softcap: float | None = None,
        output_gate: bool = False,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-5,
        qk_norm_zero_centered: bool = False,
        bias: bool = False,
        qk_bias: bool = False,
        init_std: float = 0.02,
        backend: str = "auto",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_heads(d_model, n_heads, n_kv_heads, head_dim)
        check_visibility(window, sinks, softcap)
        check_options(qk_norm, qk_norm_zero_centered, backend)
        check_biases(bias, qk_bias, output_gate)
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.rotary_width = self.head_dim
        self.window, self.softmax_scale, self.backend = window, softmax_scale, backend
        self.sinks, self.softcap = sinks, softcap
        self.qk_norm, self.output_gate = qk_norm, output_gate
        self.qk_norm_zero_centered, self.qk_bias = qk_norm_zero_centered, qk_bias
        heads, groups = n_heads * self.head_dim, n_kv_heads * self.head_dim
        d_input, gates = d_model if d_input is None else d_input, heads if output_gate else 0
        self.q_proj = Linear(d_input, heads + gates, bias=bias or qk_bias, init_std=init_std)
        self.k_proj = Linear(d_input, groups, bias=bias or qk_bias, init_std=init_std)
        self.v_proj = Linear(d_input, groups, bias=bias, init_std=init_std)
        out_std = depth_std(init_std, n_layers)
        self.out_proj = Linear(heads, d_model, bias=bias, init_std=out_std)
        norm = {"eps": qk_norm_eps, "zero_centered": qk_norm_zero_centered}
        self.q_norm = RMSNorm(self.head_dim, **norm) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, **norm) if qk_norm else None

    @property
    def score_width(self) -> int:
        return self.head_dim

    def transfer_scores(self, multiplier: float) -> None:
        at_base = self.softmax_scale
        if at_base is None:
            at_base = (self.head_dim / multiplier) ** -0.5
        self.softmax_scale = at_base / multiplier

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """With a state: prefill. ValueError when it is asked of packed rows or the cache is full.

        Only queries of this call see the given state's keys, so that a window's oldest keys can be
        overwritten afterwards.
        """
        if state is not None:
            self.check_room(ctx, state, tokens=x_BTD.shape[1])
        q_BTHK, k_BTGK, v_BTGV, gate_BTHV = self.project(x_BTD, ctx)
        if state is None or ctx.prefix_tokens == 0:
            o_BTHV = attention(
                q_BTHK,
                k_BTGK,
                v_BTGV,
                window=self.window,
                sinks=self.sinks,
                softcap=self.softcap,
                scale=self.softmax_scale,
                doc_ids_BT=ctx.doc_ids_BT,
                cu_seqlens=ctx.cu_seqlens,
                max_seqlen=ctx.max_seqlen if ctx.cu_seqlens is not None else None,
                backend=self.backend,
            )
        else:
            o_BTHV = self.read_cache(
                q_BTHK,
                torch.cat([state["k"].to(k_BTGK.dtype), k_BTGK], dim=1),
                torch.cat([state["v"].to(v_BTGV.dtype), v_BTGV], dim=1),
                ctx.positions_BT,
                torch.cat([state["positions"], ctx.positions_BT], dim=1),
            )
        if state is not None:
            state = self.write_cache(state, k_BTGK, v_BTGV, ctx)
        return self.output(o_BTHV, gate_BTHV), state

    def step(self, x_BD: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        q_B1HK, k_B1GK, v_B1GV, gate_B1HV = self.project(x_BD[:, None], ctx)
        state = self.write_cache(state, k_B1GK, v_B1GV, ctx)
        k_BSGK, v_BSGV = state["k"].to(x_BD.dtype), state["v"].to(x_BD.dtype)
        o_B1HV = self.read_cache(q_B1HK, k_BSGK, v_BSGV, ctx.positions_BT, state["positions"])
        return self.output(o_B1HV, gate_B1HV)[:, 0], state

    def project(
        self, x_BTD: Tensor, ctx: SequenceContext
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys and values, the first two normalised and rotated; gates before sigmoid."""
        q, k, v = linears(x_BTD, self.q_proj, self.k_proj, self.v_proj)
        q_BTHK = rearrange(q, "b t (h k) -> b t h k", h=self.n_heads)
        gate_BTHV = None
        if self.output_gate:
            q_BTHK, gate_BTHV = q_BTHK.chunk(2, dim=-1)
        k_BTGK = rearrange(k, "b t (g k) -> b t g k", g=self.n_kv_heads)
        v_BTGV = rearrange(v, "b t (g v) -> b t g v", g=self.n_kv_heads)
        if self.q_norm is not None:
            q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if ctx.rotary is not None:
            rotary = ctx.rotary[self.rotary_width]
            q_BTHK, k_BTGK = apply_rotary(q_BTHK, k_BTGK, rotary)
        return q_BTHK, k_BTGK, v_BTGV, gate_BTHV

    def output(self, o_BTHV: Tensor, gate_BTHV: Tensor | None) -> Tensor:
        if gate_BTHV is not None:
            o_BTHV = o_BTHV * torch.sigmoid(gate_BTHV)  # computed in float32, rounded once
        return self.out_proj(rearrange(o_BTHV, "b t h v -> b t (h v)"))

    def read_cache(
        self,
        q_BTHK: Tensor,
        k_BSGK: Tensor,
        v_BSGV: Tensor,
        q_positions_BT: Tensor,
        k_positions_BS: Tensor,
    ) -> Tensor:
        """o_BTHV of queries and keys that carry their positions."""
        return attention(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            window=self.window,
            sinks=self.sinks,
            softcap=self.softcap,
            scale=self.softmax_scale,
            q_positions_BT=q_positions_BT,
            k_positions_BS=k_positions_BS,
            backend="reference" if self.backend == "reference" else "auto",
        )

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """k, v: [B, S, G, K]; positions: int64 [B, S], -1 for an empty slot. S: self.slots()."""
        slots = self.slots(max_tokens)
        shape = (batch, slots, self.n_kv_heads, self.head_dim)
        return {
            "k": torch.zeros(shape, device=device, dtype=dtype),
            "v": torch.zeros(shape, device=device, dtype=dtype),
            "positions": torch.full((batch, slots), -1, device=device),
        }

    def slots(self, max_tokens: int) -> int:
        """Slots of a cache for rows of at most max_tokens: a window needs only itself and sinks."""
        return max_tokens if self.window is None else min(max_tokens, self.sinks + self.window)

    def cache_slots(self, state: State, positions_BT: Tensor) -> Tensor:
        return self.slot(positions_BT, state["k"].shape[1])

    def check_room(self, ctx: SequenceContext, state: State, tokens: int) -> None:
        """ValueError when a prefill does not fit its state."""
        if not ctx.is_dense:
            raise ValueError(
                "attention: got a state together with packed documents, expected one document a "
                "row; make the context with SequenceContext.dense"
            )
        slots, total = state["k"].shape[1], ctx.prefix_tokens + tokens
        if total > slots and (self.window is None or self.sinks + self.window != slots):
            raise ValueError(
                f"attention: got {total} tokens for a state of {slots}, expected at most its "
                "max_tokens; make it with a larger init_state(max_tokens=...)"
            )

    def kernel_backend(
        self, *, device: torch.device, dtype: torch.dtype, tokens: int, documents: bool
    ) -> str:
        on_gpu, hides = device.type == "cuda", self.window is not None and self.window < tokens
        case = Case(
            device=device.type,
            capability=torch.cuda.get_device_capability(device) if on_gpu else None,
            dtype=dtype,
            heads=self.n_heads,
            kv_heads=self.n_kv_heads,
            k_width=self.head_dim,
            v_width=self.head_dim,
            window=self.window if hides else None,
            sinks=self.sinks if hides else 0,
            softcap=self.softcap is not None,
            documents=documents,
            boundaries=documents,
            training=True,
        )
        return select_backend(case, self.backend).backend

    def flops_per_token(self, tokens: int) -> float:
        projections = (self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        pairs = visible_pairs(tokens, window=self.window, sinks=self.sinks)
        mixing = 4.0 * self.n_heads * self.head_dim * pairs / tokens
        return sum(linear.flops_per_token() for linear in projections) + mixing

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        kv_bytes = 2 * self.n_kv_heads * self.head_dim * dtype.itemsize
        return self.slots(tokens) * (kv_bytes + torch.int64.itemsize)

    def write_cache(
        self, state: State, k_BTGK: Tensor, v_BTGV: Tensor, ctx: SequenceContext
    ) -> State:
        """Puts the tokens that stay into their slots, in place; the state's buffers live on."""
        slots = state["k"].shape[1]
        sunk, last = self.kept(k_BTGK.shape[1], slots, ctx.prefix_tokens)

        def staying(x_BT: Tensor) -> Tensor:
            return torch.cat([x_BT[:, :sunk], x_BT[:, last:]], dim=1) if sunk else x_BT[:, last:]

        positions_BT = staying(ctx.positions_BT)
        rows_B1 = torch.arange(positions_BT.shape[0], device=positions_BT.device)[:, None]
        where_BT = self.slot(positions_BT, slots)
        state["k"][rows_B1, where_BT] = staying(k_BTGK).to(state["k"].dtype)
        state["v"][rows_B1, where_BT] = staying(v_BTGV).to(state["v"].dtype)
        state["positions"][rows_B1, where_BT] = positions_BT
        return state

    def kept(self, tokens: int, slots: int, prefix_tokens: int) -> tuple[int, int]:
        """(a, b): of so many new tokens [0, a) stay as sinks and [b, tokens) as the last ones.

        Their slots differ: what a slot written twice would hold is not defined.
        """
        sunk = max(0, min(self.sinks - prefix_tokens, tokens))
        return sunk, max(sunk, tokens - max(slots - self.sinks, 0))

    def slot(self, positions_BT: Tensor, slots: int) -> Tensor:
        """Where each position lies in a cache of so many slots."""
        ring_BT = self.sinks + (positions_BT - self.sinks) % max(slots - self.sinks, 1)
        return torch.where(positions_BT < self.sinks, positions_BT, ring_BT)


def check_heads(d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None) -> None:
    """ValueError for heads that cannot be made."""
    if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(
            f"attention: got n_heads={n_heads} and n_kv_heads={n_kv_heads}, expected positive "
            "numbers, the second dividing the first; set mixer.n_heads or mixer.n_kv_heads"
        )
    if head_dim is None and d_model % n_heads:
        raise ValueError(
            f"attention: got d_model={d_model} and n_heads={n_heads}, expected a multiple; "
            "set mixer.head_dim, or change one of the two"
        )


def check_visibility(window: int | None, sinks: int, softcap: float | None) -> None:
    """ValueError for knobs that show no key, or have no effect."""
    if window is not None and window < 1:
        raise ValueError(
            f"attention: got window={window}, expected at least 1 (a token sees itself) or "
            "null for no window; set mixer.window"
        )
    if sinks < 0 or (sinks and window is None):
        raise ValueError(
            f"attention: got sinks={sinks} and window={window}, expected 0, or a positive number "
            "with a window (without one every token is visible anyway); set mixer.sinks or "
            "mixer.window"
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(
            f"attention: got softcap={softcap}, expected a positive number or null for no cap; "
            "set mixer.softcap"
        )


def check_options(qk_norm: bool, zero_centered: bool, backend: str) -> None:
    """ValueError for a norm that is not there, or an unknown backend."""
    if zero_centered and not qk_norm:
        raise ValueError(
            "attention: got qk_norm_zero_centered=true with qk_norm=false, where it has no "
            "effect, expected false; set mixer.qk_norm=true or leave it out"
        )
    check_backend("attention", backend, BACKENDS)


def check_biases(bias: bool, qk_bias: bool, output_gate: bool) -> None:
    """ValueError for biases given twice, or that would reach into the output gate."""
    if qk_bias and (bias or output_gate):
        other = "bias" if bias else "output_gate"
        raise ValueError(
            f"attention: got qk_bias=true with {other}=true, expected one of the two; set "
            "mixer.qk_bias=false (bias=true has biases of queries and keys too)"
        )
