"""mLSTM: a matrix memory a head, with exponential (or sigmoid) input and sigmoid forget gates.

    q_t, k_t = W_q u_t, W_k u_t    v_t = W_v x_t    u = x, or silu(causal_conv(x))
    i_t, f_t = cap(w_i . x_t + b_i), cap(w_f . x_t + b_f)      one a head; cap(z) = c tanh(z / c)
    C_t = sigmoid(f_t) C_{t-1} + exp(i_t) k_t v_t^T            n_t the same with k_t alone
    h_t = C_t^T q_t / max(|n_t . q_t|, 1)                      stabilised: llmtrain_kernels.mlstm
    y_t = W_out (sigmoid(W_o x_t) * norm(h_t))                 norm of every head by itself

Beck et al. 2024 (arXiv:2405.04517, eq. 19-27); the layer, its soft-capped gates and its first
biases as in xLSTM-7B (arXiv:2503.13427, section 3); input_gate="sigmoid": arXiv:2503.14376.

Parameters: D (2 H K + 3 H V) for the projections and D 2 H for the gates. FLOPs a token: 2 per
weight and H (4 K V + 2 K) for the memory. State: C, n, m in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from llmtrain_kernels.causal_conv import causal_conv
from llmtrain_kernels.mlstm import BACKENDS, INPUT_GATES, mlstm
from torch import Tensor, nn

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.mixers.checks import check_backend, check_optional_window, check_sizes
from llmtrain.model.head_norm import HeadNorm
from llmtrain.model.init import depth_std
from llmtrain.model.linear import Linear


class MLSTM(Mixer):
    """qk_dim_factor, v_dim_factor: widths H K and H V as shares of d_model.

    d_conv: window of the convolution before queries and keys, None for none. gate_soft_cap: c,
    None for none. input_gate_bias: first b_i; forget gates start at forget_gate_bias[0] in the
    first head, evenly up to [1] in the last. gate_init_std: of the gates' weights. bias: of the
    projections, not of the gates, which have one. chunk: tokens a chunk of the kernel.
    """

    no_matrices = ("gate_proj.weight",)

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        n_heads: int,
        qk_dim_factor: float = 0.5,
        v_dim_factor: float = 1.0,
        d_conv: int | None = None,
        input_gate: str = "exp",
        gate_soft_cap: float | None = 15.0,
        input_gate_bias: float = -10.0,
        forget_gate_bias: Sequence[float] = (3.0, 6.0),
        gate_init_std: float = 0.0,
        head_norm: str = "layernorm",
        norm_eps: float = 1e-6,
        bias: bool = False,
        init_std: float = 0.02,
        chunk: int = 64,
        backend: str = "auto",
    ):
        super().__init__()
        check_gates(input_gate, gate_soft_cap, forget_gate_bias)
        check_optional_window("mlstm", d_conv)
        check_sizes("mlstm", {"n_heads": n_heads, "chunk": chunk})
        check_backend("mlstm", backend, BACKENDS)
        self.d_model, self.n_heads = d_model, n_heads
        self.qk_width = whole_heads(d_model, qk_dim_factor, n_heads, "qk_dim_factor")
        self.v_width = whole_heads(d_model, v_dim_factor, n_heads, "v_dim_factor")
        self.d_conv, self.input_gate, self.gate_soft_cap = d_conv, input_gate, gate_soft_cap
        self.input_gate_bias, self.forget_gate_bias = input_gate_bias, tuple(forget_gate_bias)
        self.chunk, self.backend = chunk, backend
        self.q_proj = Linear(d_model, self.qk_width, bias=bias, init_std=init_std)
        self.k_proj = Linear(d_model, self.qk_width, bias=bias, init_std=init_std)
        self.v_proj = Linear(d_model, self.v_width, bias=bias, init_std=init_std)
        self.o_proj = Linear(d_model, self.v_width, bias=bias, init_std=init_std)
        # rows [0, H) are the input gates, [H, 2H) the forget gates
        self.gate_proj = Linear(d_model, 2 * n_heads, init_std=gate_init_std)
        self.gate_bias = nn.Parameter(torch.empty(2 * n_heads))
        self.norm = HeadNorm(n_heads, self.v_width // n_heads, kind=head_norm, eps=norm_eps)
        out_std = depth_std(init_std, n_layers)
        self.out_proj = Linear(self.v_width, d_model, bias=bias, init_std=out_std)
        self.conv_weight = None if d_conv is None else nn.Parameter(torch.empty(d_model, d_conv))
        self.conv_bias = None if d_conv is None else nn.Parameter(torch.empty(d_model))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            input_H, forget_H = self.gate_bias.chunk(2)
            input_H.fill_(self.input_gate_bias)
            forget_H.copy_(torch.linspace(*self.forget_gate_bias, self.n_heads))
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
        q_BTHK = rearrange(self.q_proj(u_BTD), "b t (h k) -> b t h k", h=self.n_heads)
        k_BTHK = rearrange(self.k_proj(u_BTD), "b t (h k) -> b t h k", h=self.n_heads)
        v_BTHV = rearrange(self.v_proj(x_BTD), "b t (h v) -> b t h v", h=self.n_heads)
        i_BTH, f_BTH = self.gates(x_BTD).chunk(2, dim=-1)
        memory = None if state is None else tuple(state[name] for name in self.memory_names)
        h_BTHV, memory = mlstm(
            q_BTHK,
            k_BTHK,
            v_BTHV,
            i_BTH,
            f_BTH,
            input_gate=self.input_gate,
            initial_state=memory,
            doc_ids_BT=ctx.doc_ids_BT,
            return_state=state is not None,
            chunk=self.chunk,
            backend=self.backend,
        )
        y_BTD = self.out_proj(self.norm(h_BTHV, self.o_proj(x_BTD)))
        if state is None:
            return y_BTD, None
        new_state |= {
            n: z.to(state[n].dtype) for n, z in zip(self.memory_names, memory, strict=True)
        }
        return y_BTD, new_state

    def gates(self, x_BTD: Tensor) -> Tensor:
        """Pre-activations [B, T, 2 H] in float32. The bias is added there, as -10 in bfloat16 would
        round what the weights add to it to multiples of 1/16."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        gates_BTH = self.gate_proj(x_BTD).to(dtype) + self.gate_bias.to(dtype)
        if self.gate_soft_cap is None:
            return gates_BTH
        return self.gate_soft_cap * torch.tanh(gates_BTH / self.gate_soft_cap)

    @property
    def memory_names(self) -> tuple[str, ...]:
        """Keys of the memory in the state, in the kernel's order."""
        return ("C", "n", "m") if self.input_gate == "exp" else ("C",)

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """C [B, H, K, V], n [B, H, K], m [B, H] in float32 (float64 for float64), all zero; conv
        [B, W-1, D] in dtype."""
        heads, memory_dtype = self.n_heads, torch.promote_types(dtype, torch.float32)
        shape = (batch, heads, self.qk_width // heads, self.v_width // heads)
        shapes = {"C": shape, "n": shape[:3], "m": shape[:2]}
        state = {
            name: torch.zeros(shapes[name], device=device, dtype=memory_dtype)
            for name in self.memory_names
        }
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
        return "chunked" if self.backend == "auto" else self.backend

    def flops_per_token(self, tokens: int) -> float:
        linears = (module for module in self.children() if isinstance(module, Linear))
        memory = 4.0 * self.qk_width * self.v_width / self.n_heads
        normaliser = 2.0 * self.qk_width if self.input_gate == "exp" else 0.0
        return sum(linear.flops_per_token() for linear in linears) + memory + normaliser

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        state = self.init_state(1, max_tokens=tokens, device="meta", dtype=dtype)
        return sum(z.numel() * z.itemsize for z in state.values())

    def kept_bytes(self, dtype: torch.dtype, *, compiled: bool) -> float:
        size, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
        weights, convolved = self.n_heads * self.chunk, 0 if self.d_conv is None else self.d_model
        # 8 more columns of values a head: the normaliser, filled up
        values = self.v_width + (8 * self.n_heads if self.input_gate == "exp" else 0)
        states = (size + wide) * self.qk_width * values / self.n_heads / self.chunk
        kept = states + size * (4 * values + 2 * self.qk_width + 2 * weights + 2 * convolved)
        return kept if compiled else kept + size * 2 * values + wide * (weights + convolved)


def check_gates(
    input_gate: str, gate_soft_cap: float | None, forget_gate_bias: Sequence[float]
) -> None:
    """ValueError for gates that no mLSTM can have."""
    if input_gate not in INPUT_GATES:
        raise ValueError(
            f"mlstm: got input_gate={input_gate!r}, expected one of {', '.join(INPUT_GATES)}; "
            "set mixer.input_gate"
        )
    if gate_soft_cap is not None and gate_soft_cap <= 0:
        raise ValueError(
            f"mlstm: got gate_soft_cap={gate_soft_cap}, expected a positive number or null; "
            "set mixer.gate_soft_cap"
        )
    if len(forget_gate_bias) != 2:
        raise ValueError(
            f"mlstm: got forget_gate_bias={list(forget_gate_bias)}, expected two numbers, the "
            "first head's and the last head's; set mixer.forget_gate_bias"
        )


def whole_heads(d_model: int, factor: float, n_heads: int, knob: str) -> int:
    """int(d_model * factor). ValueError when it does not divide into the heads."""
    width = int(d_model * factor)
    if width < 1 or width % n_heads:
        raise ValueError(
            f"mlstm: got a width of {width} (d_model={d_model} x {knob}={factor}) for "
            f"n_heads={n_heads}, expected a positive multiple of it; set mixer.{knob} or "
            "mixer.n_heads"
        )
    return width
