"""Mamba: a selective state space with a decay for every channel and state (S6).

    x_t, z_t = W_in u_t                          x then passes a causal convolution and SiLU
    dt_t, B_t, C_t = W_x x_t                     of R, K, K numbers; RMSNorms on them if inner_norm
    dt_t = clamp(softplus(W_dt dt_t + dt_bias))  one a channel
    h_t = exp(-exp(A_log) dt_t) * h_{t-1} + (dt_t x_t) B_t        h [F, K]
    o_t = W_out ((h_t C_t + D x_t) * silu(z_t))

Gu and Dao 2023, arXiv:2312.00752, sections 3.2 to 3.6 and algorithm 2; the scan is
llmtrain_kernels.selective_scan. inner_norm: Jamba (arXiv:2403.19887). Heads of V = F / H channels
with W_x and W_dt of their own: Zamba (arXiv:2405.16712).

With F = expand * d_model inner channels: parameters 3 F D + F (W + 1) + 2 F R + 2 F K + F (K + 2)
with the convolution's bias; FLOPs a token: 2 for each weight of the projections, 4 F K for the
state's write and read. State: F K numbers in float32 and the last W - 1 inputs of the convolution.

The steps dt, the decays, the state and the gate are float32. Ours: the upper limit of dt is finite
by default, and gates z are clamped at 1e4, so that no finite value of them makes a NaN; published
checkpoints have no limit (dt_limit: [0, inf]).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from llmtrain_kernels.causal_conv import causal_conv
from llmtrain_kernels.selective_scan import BACKENDS, selective_scan
from torch import Tensor, nn

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.mixers.checks import check_backend, check_sizes, check_time_steps
from llmtrain.model.init import depth_std, fill_time_steps
from llmtrain.model.linear import Linear, cast_parameter
from llmtrain.model.norm import RMSNorm

GATE_LIMIT = 1e4  # of |z|: gated outputs stay finite in bfloat16


class Mamba(Mixer):
    """d_state: K. expand: F / d_model. d_conv: W, tokens that the convolution sees. dt_rank: R, or
    "auto" for d_model / 16, rounded up. n_heads: H. bias: of the projections from and to the
    residual stream. inner_norm: RMSNorms on dt, B and C.

    First values: dt log-uniform in [dt_min, dt_max] and at least dt_floor, decay rates 1 .. K in
    every channel, D = 1. dt_limit: (lowest, highest) dt. chunk, backend: of
    llmtrain_kernels.selective_scan.
    """

    no_weight_decay = ("A_log", "D", "dt_bias")
    matrices = ("x_proj",)

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        d_state: int = 16,
        expand: int = 2,
        d_conv: int = 4,
        dt_rank: int | str = "auto",
        n_heads: int = 1,
        conv_bias: bool = True,
        bias: bool = False,
        inner_norm: bool = False,
        norm_eps: float = 1e-5,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        dt_limit: Sequence[float] = (0.0, 100.0),
        init_std: float = 0.02,
        chunk: int = 64,
        backend: str = "auto",
    ):
        super().__init__()
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        sizes = {"d_state": d_state, "expand": expand, "d_conv": d_conv, "n_heads": n_heads}
        check_sizes("mamba", {**sizes, "chunk": chunk})
        check_ranks(rank, n_heads, expand * d_model)
        check_time_steps("mamba", dt_min, dt_max, dt_floor, dt_limit)
        check_backend("mamba", backend, BACKENDS)
        self.d_inner, self.d_state, self.d_conv = expand * d_model, d_state, d_conv
        self.dt_rank, self.n_heads, self.init_std = int(rank), n_heads, init_std
        self.dt_min, self.dt_max, self.dt_floor = dt_min, dt_max, dt_floor
        self.dt_limit, self.chunk, self.backend = tuple(dt_limit), chunk, backend
        width, per_head = self.d_inner, self.d_inner // n_heads
        self.in_proj = Linear(d_model, 2 * width, bias=bias, init_std=init_std)
        self.matrix_splits = {"in_proj.weight": (width, width)}
        self.init_splits = {"x_proj": (self.dt_rank, d_state, d_state)}
        self.scaled_init = ("dt_proj",) if dt_rank == "auto" else ()
        self.conv_weight = nn.Parameter(torch.empty(width, d_conv))
        self.conv_bias = nn.Parameter(torch.empty(width)) if conv_bias else None
        self.x_proj = nn.Parameter(torch.empty(n_heads, self.dt_rank + 2 * d_state, per_head))
        self.dt_proj = nn.Parameter(torch.empty(n_heads, per_head, self.dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(width))
        self.dt_norm = RMSNorm(self.dt_rank, eps=norm_eps) if inner_norm else None
        self.b_norm = RMSNorm(d_state, eps=norm_eps) if inner_norm else None
        self.c_norm = RMSNorm(d_state, eps=norm_eps) if inner_norm else None
        self.A_log = nn.Parameter(torch.empty(width, d_state))
        self.D = nn.Parameter(torch.empty(width))
        out_std = depth_std(init_std, n_layers)
        self.out_proj = Linear(width, d_model, bias=bias, init_std=out_std)

    def reset_parameters(self) -> None:
        with torch.no_grad():
            bound = self.d_conv**-0.5
            self.conv_weight.uniform_(-bound, bound)
            if self.conv_bias is not None:
                self.conv_bias.zero_()
            self.x_proj.normal_(std=self.init_std)
            bound = self.dt_rank**-0.5
            self.dt_proj.uniform_(-bound, bound)
            self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log())
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
        """Project, convolve, select, scan, gate, project."""
        x_BTF, z_BTF = self.in_proj(x_BTD).chunk(2, dim=-1)
        x_BTF, conv_state = causal_conv(
            x_BTF,
            self.conv_weight,
            self.conv_bias,
            initial_state_BWD=None if state is None else state["conv"],
            doc_ids_BT=doc_ids_BT,
            return_state=state is not None,
            backend=backend,
        )
        dt_BTF, b_BTHK, c_BTHK = self.select(x_BTF)
        y_BTF, ssm_state = selective_scan(
            x_BTF,
            dt_BTF,
            -self.A_log.exp(),
            b_BTHK,
            c_BTHK,
            self.D,
            initial_state_BDK=None if state is None else state["ssm"],
            doc_ids_BT=doc_ids_BT,
            return_state=state is not None,
            chunk=self.chunk,
            backend=backend,
        )
        gate_BTF = F.silu(z_BTF.to(dt_BTF.dtype).clamp(-GATE_LIMIT, GATE_LIMIT))
        y_BTF = (y_BTF * gate_BTF).to(x_BTD.dtype)
        if state is not None:
            new = {"conv": conv_state, "ssm": ssm_state}
            state = {name: value.to(state[name].dtype) for name, value in new.items()}
        return self.out_proj(y_BTF), state

    def select(self, x_BTF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What depends on the input: steps dt_BTF in float32, b_BTHK and c_BTHK."""
        batch = x_BTF.shape[0]  # x: rows and tokens, flat, so that a head is one product
        x_HxV = rearrange(x_BTF, "b t (h v) -> h (b t) v", h=self.n_heads)
        selected = x_HxV @ cast_parameter(self.x_proj, x_BTF).mT
        selected = rearrange(selected, "h (b t) r -> b t h r", b=batch)
        dt_BTHR, b_BTHK, c_BTHK = selected.split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if self.dt_norm is not None:
            dt_BTHR = self.dt_norm(dt_BTHR)
            b_BTHK, c_BTHK = self.b_norm(b_BTHK), self.c_norm(c_BTHK)
        dt_HxR = rearrange(dt_BTHR, "b t h r -> h (b t) r")
        dt_HxV = dt_HxR @ cast_parameter(self.dt_proj, x_BTF).mT
        dt_BTF = rearrange(dt_HxV, "h (b t) v -> b t (h v)", b=batch)
        dtype = torch.promote_types(x_BTF.dtype, torch.float32)
        dt_BTF = F.softplus(dt_BTF.to(dtype) + self.dt_bias).clamp(*self.dt_limit)
        return dt_BTF, b_BTHK, c_BTHK

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """conv: [B, W-1, F], inputs of the convolution; ssm: [B, F, K], float32."""
        conv, ssm = (self.d_conv - 1, self.d_inner), (self.d_inner, self.d_state)
        state_dtype = torch.promote_types(dtype, torch.float32)
        return {
            "conv": torch.zeros(batch, *conv, device=device, dtype=dtype),
            "ssm": torch.zeros(batch, *ssm, device=device, dtype=state_dtype),
        }

    def kernel_backend(
        self, *, device: torch.device, dtype: torch.dtype, tokens: int, documents: bool
    ) -> str:
        return "chunked" if self.backend == "auto" else self.backend

    def flops_per_token(self, tokens: int) -> float:
        projections = self.in_proj.flops_per_token() + self.out_proj.flops_per_token()
        selection = 2.0 * (self.x_proj.numel() + self.dt_proj.numel())
        return projections + selection + 4.0 * self.d_inner * self.d_state

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        state_dtype = torch.promote_types(dtype, torch.float32)
        conv_bytes = (self.d_conv - 1) * self.d_inner * dtype.itemsize
        return conv_bytes + self.d_inner * self.d_state * state_dtype.itemsize

    def kept_bytes(self, dtype: torch.dtype, *, compiled: bool) -> float:
        size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
        states = wide * self.d_inner * self.d_state / self.chunk  # one before every chunk
        kept = states + (4 * size + wide) * self.d_inner
        return kept if compiled else kept + 6 * wide * self.d_inner


def check_ranks(dt_rank: int | str, n_heads: int, d_inner: int) -> None:
    """ValueError for a rank that cannot be, and heads that do not divide the channels."""
    if not isinstance(dt_rank, int) or dt_rank < 1:
        raise ValueError(
            f"mamba: got dt_rank={dt_rank!r}, expected at least 1, or auto for d_model / 16; "
            "set mixer.dt_rank"
        )
    if d_inner % n_heads:
        raise ValueError(
            f"mamba: got n_heads={n_heads}, expected a divisor of expand * d_model = "
            f"{d_inner}; set mixer.n_heads, mixer.expand or model.d_model"
        )
