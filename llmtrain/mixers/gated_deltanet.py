"""Gated DeltaNet: a linear recurrence that corrects what its state says about each key.

    q_t, k_t, v_t = silu(conv(W_qkv x_t))        q, k then divided by their norm, a head each
    beta_t = sigmoid(W_b x_t)                    twice that with allow_neg_eigval
    g_t = -exp(A_log) softplus(W_a x_t + dt_bias)
    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T
    o_t = q_t^T S_t / sqrt(K)                    head h reads q and k of group h // (H / G)
    y_t = W_o (norm(o_t) * silu(W_z x_t))        an RMSNorm over each head

Yang, Kautz and Hatamizadeh 2024 (arXiv:2412.06464, section 3.4 and figure 1); grouped value heads
as in Qwen3-Next. allow_neg_eigval: eigenvalues of the transition in [-1, 1], which track states
(Grazzi et al. 2024, arXiv:2411.12537). decay and output_gate off, expand_k and expand_v 1: DeltaNet
(Yang et al. 2024, arXiv:2406.06484). The recurrence in chunks: llmtrain_kernels.delta_rule.

Parameters, with G key heads of width K and H value heads of width V: D (2 G K + 3 H V + 2 H) +
W (2 G K + H V) + 2 H + V. FLOPs a token: 2 for each weight of the projections, 6 H K V for what the
state says of k, the write and the read. State: H K V numbers in float32 and the last W - 1 inputs
of the convolution.

Norms, gates, the state and the chunks' systems are float32 (float64 stays). Ours: output gates are
clamped at 1e4, so that no finite value of them makes a NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from llmtrain_kernels.causal_conv import causal_conv
from llmtrain_kernels.delta_rule import BACKENDS, gated_delta_rule
from torch import Tensor, nn

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.mixers.checks import check_backend, check_rates, check_sizes
from llmtrain.model.init import depth_std, fill_time_steps
from llmtrain.model.linear import Linear
from llmtrain.model.norm import GatedRMSNorm, RMSNorm

L2_EPS = 1e-6  # added to the squared norm of queries and keys, as published models have it
FIRST_DECAYS = (0.001, 0.1, 0.01, 16.0)  # dt_min, dt_max and A_range unless they are given


class GatedDeltaNet(Mixer):
    """n_heads: heads G of queries and keys; n_v_heads: of values H, None for as many.

    head_dim: K; None for expand_k d_model / n_heads, and then only expand_k is given. V is
    expand_v K. d_conv: W, tokens that the convolution sees. decay, output_gate: g_t and W_z.
    First values: softplus(dt_bias) log-uniform in [dt_min, dt_max], exp(A_log) uniform in A_range.
    chunk, backend: of llmtrain_kernels.delta_rule.
    """

    no_weight_decay = ("A_log", "dt_bias")
    no_matrices = ("b_proj.weight", "a_proj.weight")

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        n_heads: int,
        n_v_heads: int | None = None,
        head_dim: int | None = None,
        expand_k: float | None = 0.75,
        expand_v: float = 2.0,
        d_conv: int = 4,
        conv_bias: bool = False,
        decay: bool = True,
        output_gate: bool = True,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        dt_min: float = FIRST_DECAYS[0],
        dt_max: float = FIRST_DECAYS[1],
        A_range: Sequence[float] = FIRST_DECAYS[2:],
        init_std: float = 0.02,
        chunk: int = 64,
        backend: str = "auto",
    ):
        super().__init__()
        n_v_heads = n_heads if n_v_heads is None else n_v_heads
        check_heads(n_heads, n_v_heads)
        check_windows(d_conv, chunk)
        check_decay(decay, dt_min, dt_max, A_range)
        check_backend("gated_deltanet", backend, BACKENDS)
        self.n_heads, self.n_v_heads = n_heads, n_v_heads
        self.head_dim = key_width(d_model, n_heads, head_dim, expand_k)
        self.v_width = value_width(self.head_dim, expand_v)
        self.decay, self.output_gate, self.allow_neg_eigval = decay, output_gate, allow_neg_eigval
        self.dt_min, self.dt_max, self.A_range = dt_min, dt_max, tuple(A_range)
        self.d_conv, self.chunk, self.backend = d_conv, chunk, backend
        keys, values = n_heads * self.head_dim, n_v_heads * self.v_width
        self.qkv_widths = (keys, keys, values)
        self.qkv_proj = Linear(d_model, sum(self.qkv_widths), init_std=init_std)
        self.matrix_splits = {"qkv_proj.weight": self.qkv_widths}
        self.conv_weight = nn.Parameter(torch.empty(sum(self.qkv_widths), d_conv))
        self.conv_bias = nn.Parameter(torch.empty(sum(self.qkv_widths))) if conv_bias else None
        self.b_proj = Linear(d_model, n_v_heads, init_std=init_std)
        self.a_proj = Linear(d_model, n_v_heads, init_std=init_std) if decay else None
        self.z_proj = Linear(d_model, values, init_std=init_std) if output_gate else None
        self.A_log = nn.Parameter(torch.empty(n_v_heads)) if decay else None
        self.dt_bias = nn.Parameter(torch.empty(n_v_heads)) if decay else None
        if not decay:
            self.no_weight_decay = ()
        gated = GatedRMSNorm(self.v_width, before_gate=True, eps=norm_eps)
        self.norm = gated if output_gate else RMSNorm(self.v_width, eps=norm_eps)
        self.out_proj = Linear(values, d_model, init_std=depth_std(init_std, n_layers))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = self.d_conv**-0.5
            self.conv_weight.uniform_(-bound, bound)
            if self.conv_bias is not None:
                self.conv_bias.zero_()
            if self.decay:
                self.A_log.uniform_(*self.A_range).log_()
                fill_time_steps(self.dt_bias, self.dt_min, self.dt_max)

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """With a state: prefill. ValueError when it is asked of packed rows."""
        return self.mix(x_BTD, ctx.doc_ids_BT, state)

    def step(self, x_BD: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        y_B1D, state = self.mix(x_BD[:, None], None, state)
        return y_B1D[:, 0], state

    def mix(
        self, x_BTD: Tensor, doc_ids_BT: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        """Project, convolve, gate, correct and read the state, norm, gate, project."""
        qkv_BTF, conv_state = causal_conv(
            self.qkv_proj(x_BTD),
            self.conv_weight,
            self.conv_bias,
            initial_state_BWD=None if state is None else state["conv"],
            doc_ids_BT=doc_ids_BT,
            return_state=state is not None,
            backend=self.backend,
        )
        q_BTF, k_BTF, v_BTF = qkv_BTF.split(self.qkv_widths, dim=-1)
        g_BTH, beta_BTH = self.gates(x_BTD)
        o_BTHV, s_BHKV = gated_delta_rule(
            unit(rearrange(q_BTF, "b t (g k) -> b t g k", g=self.n_heads)),
            unit(rearrange(k_BTF, "b t (g k) -> b t g k", g=self.n_heads)),
            rearrange(v_BTF, "b t (h v) -> b t h v", h=self.n_v_heads),
            g_BTH,
            beta_BTH,
            initial_state_BHKV=None if state is None else state["s"],
            doc_ids_BT=doc_ids_BT,
            return_state=state is not None,
            chunk=self.chunk,
            backend=self.backend,
        )
        if self.z_proj is None:
            o_BTHV = self.norm(o_BTHV)
        else:
            z_BTHV = rearrange(self.z_proj(x_BTD), "b t (h v) -> b t h v", h=self.n_v_heads)
            o_BTHV = self.norm(o_BTHV, z_BTHV)
        if state is not None:
            state = {"conv": conv_state.to(state["conv"].dtype), "s": s_BHKV.to(state["s"].dtype)}
        return self.out_proj(rearrange(o_BTHV, "b t h v -> b t (h v)")), state

    def gates(self, x_BTD: Tensor) -> tuple[Tensor | None, Tensor]:
        """(log decays or None, betas), of at least float32."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        beta_BTH = self.b_proj(x_BTD).to(dtype).sigmoid()
        if self.allow_neg_eigval:
            beta_BTH = 2 * beta_BTH
        if self.a_proj is None:
            return None, beta_BTH
        dt_BTH = F.softplus(self.a_proj(x_BTD).to(dtype) + self.dt_bias)
        return -self.A_log.exp() * dt_BTH, beta_BTH

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """conv: [B, W-1, 2 G K + H V], inputs of the convolution; s: [B, H, K, V], float32."""
        conv = (batch, self.d_conv - 1, sum(self.qkv_widths))
        s = (batch, self.n_v_heads, self.head_dim, self.v_width)
        s_dtype = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(conv, device=device, dtype=dtype),
            "s": torch.zeros(s, device=device, dtype=s_dtype),
        }

    def kernel_backend(
        self, *, device: torch.device, dtype: torch.dtype, tokens: int, documents: bool
    ) -> str:
        return "chunked" if self.backend == "auto" else self.backend

    def flops_per_token(self, tokens: int) -> float:
        projections = (self.qkv_proj, self.b_proj, self.a_proj, self.z_proj, self.out_proj)
        recurrence = 6.0 * self.n_v_heads * self.head_dim * self.v_width
        return sum(p.flops_per_token() for p in projections if p is not None) + recurrence

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        s_dtype = torch.promote_types(dtype, torch.float32)
        conv_bytes = (self.d_conv - 1) * sum(self.qkv_widths) * dtype.itemsize
        return conv_bytes + self.n_v_heads * self.head_dim * self.v_width * s_dtype.itemsize

    def kept_bytes(self, dtype: torch.dtype, *, compiled: bool) -> float:
        size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
        keys, values = self.n_v_heads * self.head_dim, self.n_v_heads * self.v_width
        convolved, pairs = sum(self.qkv_widths), self.n_v_heads * self.chunk
        states = size * keys * self.v_width / self.chunk
        kept = states + size * 2 * (convolved + keys + values)
        kept += wide * (6 * pairs + 4 * keys + 2 * values)  # the chunks' systems are float32
        if compiled:
            return kept
        return kept + wide * (2 * pairs + 4 * keys + 4 * values + convolved)


def unit(x_BTGK: Tensor) -> Tensor:
    """x / sqrt(|x|^2 + eps) a head, in x's dtype."""
    wide_BTGK = x_BTGK.to(torch.promote_types(x_BTGK.dtype, torch.float32))
    squares_BTG1 = wide_BTGK.square().sum(dim=-1, keepdim=True)
    return (wide_BTGK * torch.rsqrt(squares_BTG1 + L2_EPS)).to(x_BTGK.dtype)


def key_width(d_model: int, n_heads: int, head_dim: int | None, expand_k: float | None) -> int:
    """K. ValueError when it is given twice, not at all, or no whole number."""
    if (head_dim is None) == (expand_k is None):
        raise ValueError(
            f"gated_deltanet: got head_dim={head_dim} and expand_k={expand_k}, expected one of "
            "them, the other null; set mixer.head_dim or mixer.expand_k"
        )
    if expand_k is None:
        check_sizes("gated_deltanet", {"head_dim": head_dim})
        return head_dim
    width = round(expand_k * d_model / n_heads)
    if width < 1 or not math.isclose(width * n_heads, expand_k * d_model, rel_tol=1e-6):
        raise ValueError(
            f"gated_deltanet: got expand_k={expand_k} and n_heads={n_heads} for "
            f"d_model={d_model}, expected a whole number of channels a head, not "
            f"{expand_k * d_model / n_heads:g}; set mixer.n_heads, or mixer.head_dim with "
            "mixer.expand_k=null"
        )
    return width


def value_width(head_dim: int, expand_v: float) -> int:
    """V. ValueError when it is no whole number."""
    width = round(expand_v * head_dim)
    if width < 1 or not math.isclose(width, expand_v * head_dim, rel_tol=1e-6):
        raise ValueError(
            f"gated_deltanet: got expand_v={expand_v} for key heads of {head_dim}, expected a "
            f"whole number of channels a value head, not {expand_v * head_dim:g}; set "
            "mixer.expand_v"
        )
    return width


def check_heads(n_heads: int, n_v_heads: int) -> None:
    """ValueError for counts that do not divide."""
    if n_heads < 1 or n_v_heads < 1 or n_v_heads % n_heads:
        raise ValueError(
            f"gated_deltanet: got n_heads={n_heads} and n_v_heads={n_v_heads}, expected positive "
            "numbers, the first dividing the second; set mixer.n_heads or mixer.n_v_heads"
        )


def check_windows(d_conv: int, chunk: int) -> None:
    """ValueError for a convolution that sees nothing, or a chunk that halves do not divide."""
    check_sizes("gated_deltanet", {"d_conv": d_conv})
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(
            f"gated_deltanet: got chunk={chunk}, expected a power of two; set mixer.chunk to 32, "
            "64 or 128"
        )


def check_decay(decay: bool, dt_min: float, dt_max: float, A_range: Sequence[float]) -> None:
    """ValueError for first values that cannot be, or that no decay would read."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(
            f"gated_deltanet: got dt_min={dt_min} and dt_max={dt_max}, expected 0 < dt_min <= "
            "dt_max; set mixer.dt_min, mixer.dt_max"
        )
    check_rates("gated_deltanet", A_range)
    if not decay and (dt_min, dt_max, *A_range) != FIRST_DECAYS:
        raise ValueError(
            f"gated_deltanet: got dt_min={dt_min}, dt_max={dt_max} and A_range={list(A_range)} "
            "with decay=false, where they have no effect, expected their defaults; leave them "
            "out, or set mixer.decay=true"
        )
