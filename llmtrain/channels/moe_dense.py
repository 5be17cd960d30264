"""Dense mixture of experts: every token goes through all experts, weighted by a softmax.

    p = softmax(W_r x);   y = sum_e p_e W2_e (silu(Wg_e x) * Wu_e x)

Jacobs et al. 1991 (doi:10.1162/neco.1991.3.1.79), with SwiGLU layers as experts; what `moe` makes
sparse. Parameters: E 3 D F + D E; FLOPs a token: E 6 D F + 2 D E, two products with the matrices of
all experts side by side. The router runs in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from llmtrain_kernels.glu import glu
from torch import Tensor, nn

from llmtrain.channels.base import Aux, Channel
from llmtrain.channels.mlp import check_hidden
from llmtrain.channels.router import RouterLinear, relative_entropy
from llmtrain.context import SequenceContext
from llmtrain.model.init import depth_std
from llmtrain.model.linear import cast_parameter


class MoEDense(Channel):
    """hidden: of one expert. Logged: router_entropy over log E, 1 being even weights."""

    matrices = ("gate_up", "down")

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        n_experts: int,
        hidden: int,
        init_std: float = 0.02,
    ):
        super().__init__()
        check_hidden(hidden)
        if n_experts < 1:
            raise ValueError(f"n_experts: got {n_experts}, expected >= 1; set channel.n_experts")
        self.n_experts, self.hidden = n_experts, hidden
        self.init_std, self.out_std = init_std, depth_std(init_std, n_layers)
        self.router = RouterLinear(d_model, n_experts, init_std=init_std)
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, hidden))
        self.matrix_splits = {"gate_up": (hidden, hidden)}

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up, std=self.init_std)
        nn.init.normal_(self.down, std=self.out_std)

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        probs_BTE = self.router(x_BTD).softmax(dim=-1)
        gate_up_FD = rearrange(cast_parameter(self.gate_up, x_BTD), "e f d -> (e f) d")
        both_BTEF = F.linear(x_BTD, gate_up_FD).unflatten(-1, (self.n_experts, -1))
        hidden_BTEF = glu(both_BTEF)
        # weights are float32 at least; the sum over experts is the matmul's own
        hidden_BTEF = (probs_BTE[..., None] * hidden_BTEF).to(x_BTD.dtype)
        down_DF = rearrange(cast_parameter(self.down, x_BTD), "e d f -> d (e f)")
        y_BTD = F.linear(hidden_BTEF.flatten(-2), down_DF)
        return y_BTD, {"metric/router_entropy": relative_entropy(probs_BTE.detach().flatten(0, 1))}

    def flops_per_token(self) -> float:
        experts = 2.0 * (self.gate_up.numel() + self.down.numel())
        return experts + self.router.flops_per_token()

    def kept_values(self) -> tuple[int, int]:
        width = self.gate_up.shape[2]
        values = 2 * width + 3 * self.n_experts * self.hidden
        return values, self.gate_up.numel() + self.down.numel()
