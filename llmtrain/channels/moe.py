"""Mixture of experts: every token goes through top_k of n_experts SwiGLU layers.

    S, g = router(x)                                         channels/router.py
    y    = sum_{e in S} g_e W2_e (silu(Wg_e x) * Wu_e x)  +  shared(x)

Shazeer et al. 2017 (arXiv:1701.06538), Mixtral (arXiv:2401.04088). n_shared: experts that every
token takes, as one SwiGLU of n_shared times the hidden units (DeepSeekMoE, arXiv:2401.06066);
shared_gate: times sigmoid(w . x) (Qwen). Nothing is dropped, unless capacity_factor is set: then in
training an expert takes at most ceil(capacity_factor * N A / E) of a micro-batch's pairs (Switch,
arXiv:2101.03961, eq. 3), and those of the rows and tokens that come last are left out.

Against uneven loads, and router logits that grow; all can be combined:

    balance_loss       coefficient of E sum_e f_e P_e (router.balance_loss), over a micro-batch
                       or the mean over its rows
    z_loss             coefficient of mean (log sum exp l)^2 (ST-MoE, arXiv:2202.08906, eq. 5)
    bias_update_speed  u: after each step b_e += u sign(mean load - load_e), loads over all ranks
                       and micro-batches of the step (Wang et al. 2024, arXiv:2408.15664)

Parameters: E 3 D F + D E, + 3 D F_s (+ D). FLOPs a token: A 6 D F + 2 D E + 6 D F_s (+ 2 D).
Matrices of all experts are one parameter, so that ZeRO-3 and torch.compile see it used in every
step. The router runs in float32; experts in the dtype of x; their sum in float32.
"""

from __future__ import annotations

import math

import torch
from llmtrain_kernels.glu import glu
from llmtrain_kernels.grouped_matmul import (
    BACKENDS,
    Groups,
    from_groups,
    group_pairs,
    grouped_matmul,
    select_backend,
    to_groups,
)
from torch import Tensor, nn

from llmtrain.channels.base import Aux, Channel
from llmtrain.channels.mlp import SwiGLU, check_hidden
from llmtrain.channels.router import (
    Router,
    Routing,
    balance_loss,
    relative_entropy,
    router_z_loss,
)
from llmtrain.context import SequenceContext
from llmtrain.model.init import depth_std
from llmtrain.model.linear import Linear, cast_parameter

BALANCES = ("micro_batch", "sequence")


class MoE(Channel):
    """hidden: of one expert; shared_hidden: of one shared expert, None for the same.

    bias_update_speed: None for no bias; 0 for one that stays as it is. balance: what shares are
    taken over, micro_batch or sequence (a row). backend: of llmtrain_kernels.grouped_matmul.
    Logged: max_load, the largest expert's load over the mean; load_entropy and router_entropy over
    log E, 1 being even; dropped, pairs beyond capacity. All but router_entropy are of whole steps.
    """

    matrices = ("gate_up", "down")
    no_matrices = ("shared_gate.weight",)

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        n_experts: int,
        top_k: int,
        hidden: int,
        score: str = "softmax_before",
        renormalise: bool = True,
        scaling_factor: float = 1.0,
        noise: float = 0.0,
        n_shared: int = 0,
        shared_hidden: int | None = None,
        shared_gate: bool = False,
        n_groups: int = 1,
        top_groups: int = 1,
        balance_loss: float = 0.01,
        balance: str = "micro_batch",
        z_loss: float = 0.001,
        bias_update_speed: float | None = None,
        capacity_factor: float | None = None,
        init_std: float = 0.02,
        backend: str = "auto",
    ):
        super().__init__()
        check_hidden(hidden)
        check_shared(n_shared, shared_hidden, shared_gate)
        check_balancing(balance_loss, balance, z_loss, bias_update_speed, capacity_factor)
        if backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"moe: got backend={backend!r}, expected auto or one of {', '.join(BACKENDS)}; "
                "set channel.backend"
            )
        self.router = Router(
            d_model,
            n_experts=n_experts,
            top_k=top_k,
            score=score,
            renormalise=renormalise,
            scaling_factor=scaling_factor,
            noise=noise,
            n_groups=n_groups,
            top_groups=top_groups,
            with_bias=bias_update_speed is not None,
            init_std=init_std,
        )
        self.n_experts, self.top_k, self.hidden = n_experts, top_k, hidden
        self.balance_coefficient, self.balance = balance_loss, balance
        self.z_coefficient = z_loss
        self.bias_update_speed, self.capacity_factor = bias_update_speed, capacity_factor
        self.init_std, self.out_std = init_std, depth_std(init_std, n_layers)
        self.backend = backend
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, hidden))
        self.matrix_splits = {"gate_up": (hidden, hidden)}
        self.shared = self.shared_gate = None
        if n_shared:
            self.shared = SwiGLU(
                d_model,
                layer_idx=layer_idx,
                n_layers=n_layers,
                hidden=n_shared * (shared_hidden or hidden),
                init_std=init_std,
            )
        if shared_gate:
            self.shared_gate = Linear(d_model, 1, init_std=init_std)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_up, std=self.init_std)
        nn.init.normal_(self.down, std=self.out_std)

    def forward(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Aux]:
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND)
        groups = group_pairs(routing.experts_NA, self.n_experts, self.capacity(len(x_ND)))
        y_BTD = self.run_experts(x_ND, routing, groups).view(x_BTD.shape)
        if self.shared is not None:
            y_BTD = y_BTD + self.run_shared(x_BTD, ctx)
        return y_BTD, self.aux(routing, groups, rows=x_BTD.shape[0])

    def capacity(self, tokens: int) -> int | None:
        """Pairs that an expert takes of that many tokens."""
        if self.capacity_factor is None or not self.training:
            return None
        return math.ceil(self.capacity_factor * tokens * self.top_k / self.n_experts)

    def run_experts(self, x_ND: Tensor, routing: Routing, groups: Groups) -> Tensor:
        how = {"partial": self.capacity_factor is not None, "backend": self.backend}
        x_PD = to_groups(x_ND, groups, self.top_k)
        gate_up_EFD, down_EDF = cast_parameter(self.gate_up, x_ND), cast_parameter(self.down, x_ND)
        both_PF = grouped_matmul(x_PD, gate_up_EFD, groups.ends_E, **how)
        y_PD = grouped_matmul(glu(both_PF), down_EDF, groups.ends_E, **how)
        y_NAD = from_groups(y_PD, groups, self.top_k)
        # weights are float32 at least, and so are the products and their sum
        return (routing.weights_NA[..., None] * y_NAD).sum(dim=1).to(x_ND.dtype)

    def run_shared(self, x_BTD: Tensor, ctx: SequenceContext) -> Tensor:
        y_BTD, _ = self.shared(x_BTD, ctx)
        if self.shared_gate is None:
            return y_BTD
        gate_BT1 = self.shared_gate(x_BTD)
        gate_BT1 = gate_BT1.to(torch.promote_types(gate_BT1.dtype, torch.float32)).sigmoid()
        return (gate_BT1 * y_BTD).to(x_BTD.dtype)

    def aux(self, routing: Routing, groups: Groups, rows: int) -> Aux:
        """Losses, the router's entropy, and what after_step gets."""
        probs_BTE = routing.probs_NE.unflatten(0, (rows, -1))
        loads_E = groups.loads_E.to(probs_BTE.dtype)
        aux = {
            "metric/router_entropy": relative_entropy(routing.probs_NE.detach()),
            "sum/load": loads_E,
        }
        if self.capacity_factor is not None:
            pairs = routing.experts_NA.numel()
            aux["sum/dropped"] = (pairs - groups.ends_E[-1]).to(probs_BTE.dtype)
        if self.balance_coefficient > 0:
            if self.balance == "sequence":
                experts_BP = routing.experts_NA.view(rows, -1)
                chosen_BP = torch.ones_like(experts_BP, dtype=probs_BTE.dtype)
                loads_BE = probs_BTE.new_zeros(rows, self.n_experts)
                loss = balance_loss(probs_BTE, loads_BE.scatter_add(1, experts_BP, chosen_BP))
            else:
                loss = balance_loss(routing.probs_NE[None], loads_E[None])
            aux["loss/balance"] = self.balance_coefficient * loss
        if self.z_coefficient > 0:
            aux["loss/router_z"] = self.z_coefficient * router_z_loss(routing.logits_NE)
        return aux

    @property
    def stochastic(self) -> bool:
        return self.router.noise > 0

    @torch.no_grad()
    def after_step(self, sums: dict[str, Tensor]) -> Aux:
        """DeepSeek-V3, section 2.1.2: an expert with more than the mean load becomes less likely to
        be chosen, one with less more likely."""
        load_E = sums["load"]
        mean = load_E.mean()
        if self.bias_update_speed:
            step_E = self.bias_update_speed * (mean - load_E).sign()
            self.router.expert_bias.add_(step_E.to(self.router.expert_bias.dtype))
        metrics = {
            "metric/max_load": load_E.max() / mean,
            "metric/load_entropy": relative_entropy((load_E / load_E.sum())[None]),
        }
        if "dropped" in sums:
            metrics["metric/dropped"] = sums["dropped"]
        return metrics

    def kernel_backend(self, *, device: torch.device, dtype: torch.dtype) -> str:
        width = self.gate_up.shape[2]
        return select_backend(self.backend, device.type, device.index, dtype, width, self.hidden)

    def flops_per_token(self) -> float:
        expert = 2.0 * (self.gate_up[0].numel() + self.down[0].numel())
        always = [self.router, self.shared, self.shared_gate]
        return self.top_k * expert + sum(m.flops_per_token() for m in always if m is not None)

    def idle_parameters(self) -> int:
        """Of the experts that a token does not take."""
        expert = self.gate_up[0].numel() + self.down[0].numel()
        return (self.n_experts - self.top_k) * expert

    def kept_values(self) -> tuple[int, int]:
        width = self.gate_up.shape[2]
        values = self.top_k * (2 * width + 3 * self.hidden)
        return values, self.gate_up.numel() + self.down.numel()


def check_shared(n_shared: int, shared_hidden: int | None, shared_gate: bool) -> None:
    """ValueError for shared experts that are none, or knobs without them."""
    if n_shared < 0:
        raise ValueError(f"n_shared: got {n_shared}, expected >= 0; set channel.n_shared")
    if shared_hidden is not None and shared_hidden < 1:
        raise ValueError(
            f"shared_hidden: got {shared_hidden}, expected >= 1, or null for hidden; "
            "set channel.shared_hidden"
        )
    if n_shared == 0 and (shared_gate or shared_hidden is not None):
        raise ValueError(
            f"n_shared: got 0 with shared_hidden={shared_hidden} and shared_gate={shared_gate}, "
            "which then have no effect, expected n_shared >= 1; set channel.n_shared, or "
            "channel.shared_hidden=null and channel.shared_gate=false"
        )


def check_balancing(
    balance_loss: float,
    balance: str,
    z_loss: float,
    bias_update_speed: float | None,
    capacity_factor: float | None,
) -> None:
    """ValueError for coefficients below zero and unknown names."""
    for name, value in (
        ("balance_loss", balance_loss),
        ("z_loss", z_loss),
        ("bias_update_speed", bias_update_speed or 0.0),
    ):
        if value < 0:
            raise ValueError(f"{name}: got {value}, expected >= 0; set channel.{name}")
    if balance not in BALANCES:
        raise ValueError(
            f"balance: got {balance!r}, expected one of {', '.join(BALANCES)}; set channel.balance"
        )
    if balance != "micro_batch" and balance_loss == 0:
        raise ValueError(
            f"balance: got {balance} with balance_loss=0, where it has no effect, expected "
            "micro_batch; set channel.balance_loss, or channel.balance=micro_batch"
        )
    if capacity_factor is not None and capacity_factor <= 0:
        raise ValueError(
            f"capacity_factor: got {capacity_factor}, expected more than 0, or null to drop "
            "nothing; set channel.capacity_factor"
        )
