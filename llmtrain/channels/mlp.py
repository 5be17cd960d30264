"""Feed-forward channel mixers: GELU, squared ReLU, SwiGLU, GeGLU.

GELU:   y = W2 gelu(W1 x)           Hendrycks and Gimpel 2016, arXiv:1606.08415 (exact or tanh form)
ReLU^2: y = W2 max(0, W1 x)^2       So et al. 2021, arXiv:2109.08668
SwiGLU: y = W2 (silu(Wg x) * Wu x)  Shazeer 2020, arXiv:2002.05202, eq. 6
GeGLU:  y = W2 (gelu(Wg x) * Wu x)  the same, eq. 5 (exact GELU)

FLOPs per token and parameters: 4 D F and 2 D F; the gated ones 6 D F and 3 D F. Output projections
start smaller with depth (model/init.py).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from llmtrain_kernels.glu import glu
from torch import Tensor

from llmtrain.channels.base import Aux, Channel
from llmtrain.context import SequenceContext
from llmtrain.model.init import depth_std
from llmtrain.model.linear import Linear


class TwoLayer(Channel):
    """y = down(activation(up(x))); subclasses say how the hidden units are activated."""

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        hidden: int,
        bias: bool = False,
        init_std: float = 0.02,
    ):
        super().__init__()
        check_hidden(hidden)
        self.up = Linear(d_model, hidden, bias=bias, init_std=init_std)
        self.down = Linear(hidden, d_model, bias=bias, init_std=depth_std(init_std, n_layers))

    def flops_per_token(self) -> float:
        return self.up.flops_per_token() + self.down.flops_per_token()


class Gelu(TwoLayer):
    """approximate: "none" is exact, "tanh" is GPT-2's."""

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        hidden: int,
        bias: bool = False,
        init_std: float = 0.02,
        approximate: str = "tanh",
    ):
        super().__init__(
            d_model,
            layer_idx=layer_idx,
            n_layers=n_layers,
            hidden=hidden,
            bias=bias,
            init_std=init_std,
        )
        if approximate not in ("none", "tanh"):
            raise ValueError(
                f"approximate: got {approximate!r}, expected none or tanh; set channel.approximate"
            )
        self.approximate = approximate

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        hidden_BTF = F.gelu(self.up(x_BTD), approximate=self.approximate)
        return self.down(hidden_BTF), {}


class Relu2(TwoLayer):
    """Squared ReLU; most hidden units are zero, and activation_l1 makes more of them so.

    activation_l1: coefficient of the mean hidden unit in the training loss (they are >= 0, so the
    mean is the L1 norm over tokens and units, divided by their number). 0: no such loss.
    """

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        hidden: int,
        bias: bool = False,
        init_std: float = 0.02,
        activation_l1: float = 0.0,
    ):
        super().__init__(
            d_model,
            layer_idx=layer_idx,
            n_layers=n_layers,
            hidden=hidden,
            bias=bias,
            init_std=init_std,
        )
        if activation_l1 < 0:
            raise ValueError(
                f"activation_l1: got {activation_l1}, expected >= 0; set channel.activation_l1"
            )
        self.activation_l1 = activation_l1

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        hidden_BTF = F.relu(self.up(x_BTD)).square()
        # Sums over tokens and units are taken in float32 at least.
        total = torch.promote_types(hidden_BTF.dtype, torch.float32)
        aux = {"metric/sparsity": (hidden_BTF.detach() == 0).to(total).mean()}
        if self.activation_l1 > 0:
            aux["loss/activation_l1"] = self.activation_l1 * hidden_BTF.mean(dtype=total)
        return self.down(hidden_BTF), aux


class SwiGLU(Channel):
    """Gate and up projection are one packed matrix: rows [0, F) are the gate, [F, 2F) the up."""

    activation: ClassVar[str] = "silu"  # of the gate, as llmtrain_kernels.glu names it

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        hidden: int,
        bias: bool = False,
        init_std: float = 0.02,
    ):
        super().__init__()
        check_hidden(hidden)
        self.gate_up = Linear(d_model, 2 * hidden, bias=bias, init_std=init_std)
        self.matrix_splits = {"gate_up.weight": (hidden, hidden)}
        self.down = Linear(hidden, d_model, bias=bias, init_std=depth_std(init_std, n_layers))

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        hidden_BTF = glu(self.gate_up(x_BTD), activation=self.activation)
        return self.down(hidden_BTF), {}

    def flops_per_token(self) -> float:
        return self.gate_up.flops_per_token() + self.down.flops_per_token()


class GeGLU(SwiGLU):
    """The gate's activation is the exact GELU."""

    activation = "gelu"


def check_hidden(hidden: int) -> None:
    """ValueError for a layer without hidden units."""
    if hidden < 1:
        raise ValueError(
            f"hidden: got {hidden}, expected >= 1; set model.ffn_hidden or channel.hidden"
        )
