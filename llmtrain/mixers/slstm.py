"""sLSTM: an LSTM with exponential gates, a normaliser, and recurrent weights within a head.

    z~, o~ = W_zo x_t    i~, f~ = W_if u_t        u = silu(causal_conv(x)), or x without one
    each plus h_{t-1} R and a bias; then, with the stabiliser of llmtrain_kernels.slstm,
    c_t = f_t c_{t-1} + i_t tanh(z~)    n_t = f_t n_{t-1} + i_t    h_t = sigmoid(o~) c_t / n_t
    i_t = exp(i~)    f_t = sigmoid(f~) or exp(f~)
    y_t = norm(h_t), or W_out norm(h_t)           norm of every head by itself

Beck et al. 2024 (arXiv:2405.04517, eq. 8-17 and its figure of the sLSTM block, which has W
block-diagonal, the convolution before i and f, and no output projection; the feed-forward part that
follows it is the channel mixer).

Parameters: 4 D^2 (4 D^2 / H block-diagonal) and 4 D^2 / H for R. FLOPs a token: 2 per weight.
State: h, c, n, m of D numbers in float32. Tokens come one after the other, in training too.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from llmtrain_kernels.causal_conv import causal_conv
from llmtrain_kernels.slstm import BACKENDS, FORGET_GATES, cost, select_backend, slstm
from torch import Tensor, nn

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.mixers.checks import check_backend, check_optional_window, check_sizes
from llmtrain.model.head_norm import HeadNorm
from llmtrain.model.init import depth_std
from llmtrain.model.linear import Linear, cast_parameter

MEMORY = ("h", "c", "n", "m")  # keys of the state, in the kernel's order


class SLSTM(Mixer):
    """d_conv: window of the convolution before the input and forget gates, None for none.
    forget_gate: "sigmoid" or "exp". block_diagonal: the projections to the gates read their own
    head's part of x only. recurrent_init_std: of R's first values. out_proj: a projection after the
    norm. backend: of llmtrain_kernels.slstm.
    """

    no_weight_decay = ("gate_bias",)

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        n_heads: int,
        d_conv: int | None = 4,
        forget_gate: str = "sigmoid",
        block_diagonal: bool = True,
        recurrent_init_std: float = 0.0,
        out_proj: bool = False,
        head_norm: str = "layernorm",
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(d_model, n_heads)
        check_optional_window("slstm", d_conv)
        check_backend("slstm", backend, BACKENDS)
        if forget_gate not in FORGET_GATES:
            raise ValueError(
                f"slstm: got forget_gate={forget_gate!r}, expected one of "
                f"{', '.join(FORGET_GATES)}; set mixer.forget_gate"
            )
        self.d_model, self.n_heads, self.v_width = d_model, n_heads, d_model // n_heads
        self.d_conv, self.forget_gate, self.backend = d_conv, forget_gate, backend
        self.recurrent_init_std = recurrent_init_std
        self.depth = layer_idx / max(n_layers - 1, 1)
        blocks = n_heads if block_diagonal else 1  # rows: head, then which of two gates, then V
        self.zo_proj = BlockLinear(d_model, 2 * d_model, blocks=blocks, init_std=init_std)
        self.if_proj = BlockLinear(d_model, 2 * d_model, blocks=blocks, init_std=init_std)
        # of z, i, f, o of the first head, then of the second, ..
        self.gate_bias = nn.Parameter(torch.empty(n_heads, 4 * self.v_width))
        self.recurrent = nn.Parameter(torch.empty(n_heads, self.v_width, 4 * self.v_width))
        self.norm = HeadNorm(n_heads, self.v_width, kind=head_norm, eps=norm_eps)
        out_std = depth_std(init_std, n_layers)
        self.out_proj = Linear(d_model, d_model, init_std=out_std) if out_proj else None
        self.conv_weight = None if d_conv is None else nn.Parameter(torch.empty(d_model, d_conv))
        self.conv_bias = None if d_conv is None else nn.Parameter(torch.empty(d_model))

    def reset_parameters(self) -> None:
        """Forget gates from 5 in a head's first channel down to -7 in its last, by a power that
        grows with depth: deeper layers have more channels that remember."""
        with torch.no_grad():
            self.gate_bias.zero_()
            share_V = torch.linspace(0, 1, self.v_width) ** (0.3 + 1.3 * self.depth)
            self.gate_bias.unflatten(1, (4, self.v_width))[:, 2] = 5.0 - 12.0 * share_V
        nn.init.normal_(self.recurrent, std=self.recurrent_init_std)
        if self.conv_weight is not None:
            bound = self.d_conv**-0.5  # as torch's Conv1d
            nn.init.uniform_(self.conv_weight, -bound, bound)
            nn.init.uniform_(self.conv_bias, -bound, bound)

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """ValueError when a state is given together with packed documents."""
        new_state: State = {}
        u_BTD = x_BTD
        if self.conv_weight is not None:
            u_BTD, conv_BWD = causal_conv(
                x_BTD,
                self.conv_weight,
                self.conv_bias,
                initial_state_BWD=None if state is None else state["conv"],
                doc_ids_BT=ctx.doc_ids_BT,
                return_state=state is not None,
            )
            if state is not None:
                new_state["conv"] = conv_BWD.to(state["conv"].dtype)
        h_BTHV, memory = slstm(
            self.gates(x_BTD, u_BTD),
            self.recurrent,
            forget_gate=self.forget_gate,
            initial_state=None if state is None else tuple(state[name] for name in MEMORY),
            doc_ids_BT=ctx.doc_ids_BT,
            return_state=state is not None,
            backend=self.backend,
        )
        y_BTD = self.norm(h_BTHV.to(x_BTD.dtype))
        if self.out_proj is not None:
            y_BTD = self.out_proj(y_BTD)
        if state is None:
            return y_BTD, None
        new_state |= {n: z.to(state[n].dtype) for n, z in zip(MEMORY, memory, strict=True)}
        return y_BTD, new_state

    def gates(self, x_BTD: Tensor, u_BTD: Tensor) -> Tensor:
        """Pre-activations [B, T, H, 4 V] of z, i, f, o in float32, where the bias is added."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        zo_BTHX = rearrange(self.zo_proj(x_BTD), "b t (h x) -> b t h x", h=self.n_heads)
        if_BTHX = rearrange(self.if_proj(u_BTD), "b t (h x) -> b t h x", h=self.n_heads)
        z_BTHV, o_BTHV = zo_BTHX.chunk(2, dim=-1)
        gates = torch.cat([z_BTHV, if_BTHX, o_BTHV], dim=-1)
        return gates.to(dtype) + self.gate_bias.to(dtype)

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """h, c, n, m [B, H, V] in float32 (float64 for float64), all zero; conv [B, W-1, D] in
        dtype."""
        wide, shape = torch.promote_types(dtype, torch.float32), (batch, self.n_heads, self.v_width)
        state = {name: torch.zeros(shape, device=device, dtype=wide) for name in MEMORY}
        if self.d_conv is not None:
            conv = (batch, self.d_conv - 1, self.d_model)
            state["conv"] = torch.zeros(conv, device=device, dtype=dtype)
        return state

    def step(self, x_BD: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        y_B1D, state = self.forward(x_BD[:, None], ctx, state)
        return y_B1D[:, 0], state

    def kernel_backend(
        self, *, device: torch.device, dtype: torch.dtype, tokens: int, documents: bool
    ) -> str:
        return select_backend(self.backend, device.type, dtype, self.v_width)

    def flops_per_token(self, tokens: int) -> float:
        linears = (self.zo_proj, self.if_proj, self.out_proj)
        projections = sum(x.flops_per_token() for x in linears if x is not None)
        return projections + 2.0 * self.recurrent.numel()

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        state = self.init_state(1, max_tokens=tokens, device="meta", dtype=dtype)
        return sum(z.numel() * z.itemsize for z in state.values())

    def kept_bytes(self, dtype: torch.dtype, *, compiled: bool) -> float:
        size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
        # auto counts as the loop, which keeps more: a plan does not know the machine.
        backend = "triton" if self.backend == "triton" else "loop"
        forward, _ = cost(1, heads=self.n_heads, v_width=self.v_width, dtype=dtype, backend=backend)
        kept = forward.saved_bytes + 4 * size * self.d_model  # operands of BlockLinear
        convolved = 0 if compiled or self.d_conv is None else self.d_model
        return kept + wide * convolved


def check_heads(d_model: int, n_heads: int) -> None:
    """ValueError for heads that do not divide the width."""
    check_sizes("slstm", {"n_heads": n_heads})
    if d_model % n_heads:
        raise ValueError(
            f"slstm: got d_model={d_model} and n_heads={n_heads}, expected a multiple; set "
            "mixer.n_heads or model.d_model"
        )


class BlockLinear(nn.Module):
    """y = x W^T with W of equal diagonal blocks; W ~ N(0, init_std)."""

    matrices = ("weight",)

    def __init__(self, d_in: int, d_out: int, *, blocks: int, init_std: float):
        super().__init__()
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(blocks, d_out // blocks, d_in // blocks))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x = rearrange(x_BTD, "b t (n i) -> b t n i", n=self.weight.shape[0])
        y = einsum(x, cast_parameter(self.weight, x_BTD), "b t n i, n o i -> b t n o")
        return rearrange(y, "b t n o -> b t (n o)")

    def flops_per_token(self) -> float:
        return 2.0 * self.weight.numel()
