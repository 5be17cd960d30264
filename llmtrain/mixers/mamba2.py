"""Mamba-2: a selective state space with one decay a head (state space duality, SSD).

    z_t, x_t, B_t, C_t, dt_t = W_in u_t          x, B, C pass a causal convolution and SiLU
    dt_t = clamp(softplus(dt_t + dt_bias))       one a head
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T
    y_t = C_t^T S_t + D x_t                      head h reads B and C of group h // (H / G)
    o_t = W_out norm(y_t * silu(z_t))            an RMSNorm over each of the norm's groups

Dao and Gu 2024, arXiv:2405.21060: the recurrence eq. 1 and 2, the block section 7.1 and figure 6,
the chunked form section 6 (llmtrain_kernels.scalar_decay). With F = expand * d_model = H V inner
channels, G groups and state size K:

Parameters: D (2 F + 2 G K + H) + (W + 1) (F + 2 G K) + 3 H + F + F D. FLOPs a token: 2 for each
weight of the two projections, 4 F K for the state's write and read. State: F K numbers in float32
and the last W - 1 inputs of the convolution.

The steps dt, the decays, the state, the gate and the norm are float32. Ours: the upper limit of dt
is finite by default, and gates z are clamped at 1e4, so that no finite value of them makes a NaN;
published checkpoints have dt_limit (0, inf).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from llmtrain_kernels.causal_conv import causal_conv
from llmtrain_kernels.scalar_decay import BACKENDS, scalar_decay
from torch import Tensor, nn

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.mixers.checks import check_backend, check_rates, check_sizes, check_time_steps
from llmtrain.model.init import depth_std, fill_time_steps
from llmtrain.model.linear import Linear
from llmtrain.model.norm import GatedRMSNorm


class Mamba2(Mixer):
    """d_state: K. n_groups: G. head_dim: V. expand: F / d_model. d_conv: W, tokens that the
    convolution sees. bias: of the two projections. norm_groups: groups of inner channels over which
    the gated norm takes its statistics, None for n_groups; norm_before_gate: norm(y) * silu(z).

    First values: dt log-uniform in [dt_min, dt_max] and at least dt_floor, decay rates exp(A_log)
    uniform in A_range, D = 1. dt_limit: (lowest, highest) dt. chunk, backend: of
    llmtrain_kernels.scalar_decay.
    """

    no_weight_decay = ("A_log", "D", "dt_bias")

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        d_state: int = 128,
        n_groups: int = 1,
        head_dim: int = 64,
        expand: int = 2,
        d_conv: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        norm_groups: int | None = None,
        norm_before_gate: bool = False,
        norm_eps: float = 1e-5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, 100.0),
        A_range: Sequence[float] = (1.0, 16.0),
        init_std: float = 0.02,
        chunk: int = 64,
        backend: str = "auto",
    ):
        super().__init__()
        d_inner = expand * d_model
        norm_groups = n_groups if norm_groups is None else norm_groups
        sizes = {"d_state": d_state, "n_groups": n_groups, "head_dim": head_dim, "chunk": chunk}
        check_sizes("mamba2", {**sizes, "d_conv": d_conv, "norm_groups": norm_groups})
        check_groups(d_inner, n_groups, head_dim, norm_groups)
        check_time_steps("mamba2", dt_min, dt_max, dt_floor, dt_limit)
        check_rates("mamba2", A_range)
        check_backend("mamba2", backend, BACKENDS)
        self.d_inner, self.d_state, self.n_groups = d_inner, d_state, n_groups
        self.head_dim, self.n_heads, self.d_conv = head_dim, d_inner // head_dim, d_conv
        self.dt_min, self.dt_max, self.dt_floor = dt_min, dt_max, dt_floor
        self.dt_limit, self.A_range = tuple(dt_limit), tuple(A_range)
        self.chunk, self.backend = chunk, backend
        self.conv_width = d_inner + 2 * n_groups * d_state
        groups = n_groups * d_state
        projected = (d_inner, d_inner, groups, groups, self.n_heads)  # z, x, B, C, dt
        self.in_proj = Linear(d_model, sum(projected), bias=bias, init_std=init_std)
        self.matrix_splits = {"in_proj.weight": projected}
        self.conv_weight = nn.Parameter(torch.empty(self.conv_width, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.conv_width)) if conv_bias else None
        self.A_log = nn.Parameter(torch.empty(self.n_heads))
        self.D = nn.Parameter(torch.empty(self.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.n_heads))
        gate = {"groups": norm_groups, "before_gate": norm_before_gate}
        self.norm = GatedRMSNorm(d_inner, eps=norm_eps, **gate)
        out_std = depth_std(init_std, n_layers)
        self.out_proj = Linear(d_inner, d_model, bias=bias, init_std=out_std)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = self.d_conv**-0.5
            self.conv_weight.uniform_(-bound, bound)
            if self.conv_bias is not None:
                self.conv_bias.zero_()
            self.A_log.uniform_(*self.A_range).log_()
            self.D.fill_(1.0)
            fill_time_steps(self.dt_bias, self.dt_min, self.dt_max, dt_floor=self.dt_floor)

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """With a state: prefill. ValueError when it is asked of packed rows."""
        return self.mix(x_BTD, ctx.doc_ids_BT, state, self.backend)

    def step(self, x_BD: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        y_B1D, state = self.mix(x_BD[:, None], None, state, "reference")
        return y_B1D[:, 0], state

    def mix(
        self, x_BTD: Tensor, doc_ids_BT: Tensor | None, state: State | None, backend: str
    ) -> tuple[Tensor, State | None]:
        """Project, convolve, discretise, run the state, gate, norm, project."""
        widths = (self.d_inner, self.conv_width, self.n_heads)
        z_BTF, xbc_BTF, dt_BTH = self.in_proj(x_BTD).split(widths, dim=-1)
        xbc_BTF, conv_state = causal_conv(
            xbc_BTF,
            self.conv_weight,
            self.conv_bias,
            initial_state_BWD=None if state is None else state["conv"],
            doc_ids_BT=doc_ids_BT,
            return_state=state is not None,
            backend=backend,
        )
        x_BTF, b_BTF, c_BTF = xbc_BTF.split(
            (self.d_inner, self.n_groups * self.d_state, self.n_groups * self.d_state), dim=-1
        )
        x_BTHV = rearrange(x_BTF, "b t (h v) -> b t h v", h=self.n_heads)
        dt_BTH = self.time_steps(dt_BTH)
        y_BTHV, ssm_state = scalar_decay(
            rearrange(c_BTF, "b t (g k) -> b t g k", g=self.n_groups),
            rearrange(b_BTF, "b t (g k) -> b t g k", g=self.n_groups),
            (x_BTHV * dt_BTH[..., None]).to(x_BTD.dtype),
            -self.A_log.exp() * dt_BTH,
            scale=1.0,
            initial_state_BHKV=None if state is None else state["ssm"],
            doc_ids_BT=doc_ids_BT,
            return_state=state is not None,
            chunk=self.chunk,
            backend=backend,
        )
        y_BTHV = y_BTHV + self.D[:, None] * x_BTHV
        y_BTF = self.norm(rearrange(y_BTHV, "b t h v -> b t (h v)"), z_BTF)
        if state is not None:
            new = {"conv": conv_state, "ssm": ssm_state}
            state = {name: value.to(state[name].dtype) for name, value in new.items()}
        return self.out_proj(y_BTF), state

    def time_steps(self, dt_BTH: Tensor) -> Tensor:
        """dt in float32 from its pre-activations."""
        dtype = torch.promote_types(dt_BTH.dtype, torch.float32)
        return F.softplus(dt_BTH.to(dtype) + self.dt_bias).clamp(*self.dt_limit)

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """conv: [B, W-1, F + 2 G K], inputs of the convolution; ssm: [B, H, K, V], float32."""
        ssm = (batch, self.n_heads, self.d_state, self.head_dim)
        return {
            "conv": torch.zeros(
                batch, self.d_conv - 1, self.conv_width, device=device, dtype=dtype
            ),
            "ssm": torch.zeros(ssm, device=device, dtype=torch.promote_types(dtype, torch.float32)),
        }

    def kernel_backend(
        self, *, device: torch.device, dtype: torch.dtype, tokens: int, documents: bool
    ) -> str:
        return "chunked" if self.backend == "auto" else self.backend

    def flops_per_token(self, tokens: int) -> float:
        projections = self.in_proj.flops_per_token() + self.out_proj.flops_per_token()
        return projections + 4.0 * self.d_inner * self.d_state

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        state_dtype = torch.promote_types(dtype, torch.float32)
        conv_bytes = (self.d_conv - 1) * self.conv_width * dtype.itemsize
        return conv_bytes + self.d_inner * self.d_state * state_dtype.itemsize

    def kept_bytes(self, dtype: torch.dtype, *, compiled: bool) -> float:
        size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
        inner, convolved, weights = self.d_inner, self.conv_width, self.n_heads * self.chunk
        states = (size + wide) * inner * self.d_state / self.chunk  # as made, and as read
        kept = states + size * (3 * inner + 2 * convolved + weights) + wide * 2 * inner
        if compiled:
            return kept
        return kept + size * 2 * inner + wide * (4 * inner + convolved + weights)


def check_groups(d_inner: int, n_groups: int, head_dim: int, norm_groups: int) -> None:
    """ValueError for sizes that do not divide."""
    if d_inner < 1 or d_inner % head_dim:
        raise ValueError(
            f"mamba2: got expand * d_model = {d_inner} and head_dim={head_dim}, expected a "
            "positive multiple; set mixer.head_dim, mixer.expand or model.d_model"
        )
    heads = d_inner // head_dim
    if heads % n_groups:
        raise ValueError(
            f"mamba2: got {heads} heads (expand * d_model / head_dim) and n_groups={n_groups}, "
            "expected a divisor of the heads; set mixer.n_groups or mixer.head_dim"
        )
    if d_inner % norm_groups:
        raise ValueError(
            f"mamba2: got norm_groups={norm_groups}, expected a divisor of expand * d_model = "
            f"{d_inner}; set mixer.norm_groups (null: n_groups)"
        )
