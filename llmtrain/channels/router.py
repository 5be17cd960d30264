"""Token-choice routing: which A of E experts a token takes, and with which weights.

    l_e = w_e . x                        in float32: experts hang on small differences of l
    s   = softmax(l)  or  sigmoid(l)     scores
    S   = the A largest of s_e + b_e     b: bias of aux-loss-free balancing, here only
    g_e = s_e / sum_{S} s,  times scaling_factor;  without renormalise g_e = s_e

score: softmax_before: softmax over all experts, then choose (Switch, arXiv:2101.03961; Mixtral,
arXiv:2401.04088, with renormalise); softmax_after: choose by l, then softmax over the chosen
(Shazeer et al. 2017, arXiv:1701.06538), the same weights as softmax_before renormalised; sigmoid:
DeepSeek-V3, arXiv:2412.19437, eq. 13 to 16. noise: standard deviation of a normal draw added to l
in training (fixed, as in Riquelme et al. 2021, arXiv:2106.05974; Shazeer et al. learn it).
n_groups, top_groups: experts come in equal groups, and only those of the top_groups with the
largest sums of their two best scores can be chosen (DeepSeek-V3, section 2.1.2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from llmtrain.model.linear import Linear, cast_parameter

SCORES = ("softmax_before", "softmax_after", "sigmoid")
TINY = 1e-20  # added to a sum of sigmoids, which may all have underflowed


class RouterLinear(Linear):
    """Logits in float32 at least, from float32 activations and weights."""

    no_matrices = ("weight",)

    def forward(self, x_ND: Tensor) -> Tensor:
        exact_ND = x_ND.to(torch.promote_types(x_ND.dtype, torch.float32))
        return nn.functional.linear(exact_ND, cast_parameter(self.weight, exact_ND))


class Routing(NamedTuple):
    """logits_NE: without noise; probs_NE: scores that sum to one; experts_NA: int64;
    weights_NA. All but experts_NA in float32 at least."""

    logits_NE: Tensor
    probs_NE: Tensor
    experts_NA: Tensor
    weights_NA: Tensor


class Router(RouterLinear):
    """x_ND -> Routing. with_bias: there is a buffer expert_bias, which moves choices alone."""

    def __init__(
        self,
        d_model: int,
        *,
        n_experts: int,
        top_k: int,
        score: str,
        renormalise: bool,
        scaling_factor: float,
        noise: float,
        n_groups: int,
        top_groups: int,
        with_bias: bool,
        init_std: float,
    ):
        check_choice(n_experts, top_k, n_groups, top_groups)
        check_weights(score, top_k, renormalise, noise)
        super().__init__(d_model, n_experts, init_std=init_std)
        self.n_experts, self.top_k = n_experts, top_k
        self.score, self.renormalise, self.scaling_factor = score, renormalise, scaling_factor
        self.noise, self.n_groups, self.top_groups = noise, n_groups, top_groups
        self.register_buffer("expert_bias", torch.zeros(n_experts) if with_bias else None)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "expert_bias", None) is not None:  # nn.Linear's constructor calls this too
            nn.init.zeros_(self.expert_bias)

    def forward(self, x_ND: Tensor) -> Routing:
        logits_NE = noisy_NE = super().forward(x_ND)
        if self.noise > 0 and self.training:
            noisy_NE = logits_NE + self.noise * torch.randn_like(logits_NE)
        if self.score == "sigmoid":
            scores_NE = noisy_NE.sigmoid()
            probs_NE = scores_NE / (scores_NE.sum(dim=-1, keepdim=True) + TINY)
        else:
            scores_NE = probs_NE = noisy_NE.softmax(dim=-1)
        after = self.score == "softmax_after"
        experts_NA = self.choose(noisy_NE if after else scores_NE)
        if after:
            weights_NA = noisy_NE.gather(1, experts_NA).softmax(dim=-1)
        else:
            weights_NA = scores_NE.gather(1, experts_NA)
            if self.renormalise:
                weights_NA = weights_NA / (weights_NA.sum(dim=-1, keepdim=True) + TINY)
        return Routing(logits_NE, probs_NE, experts_NA, self.scaling_factor * weights_NA)

    @torch.no_grad()
    def choose(self, scores_NE: Tensor) -> Tensor:
        """The experts of every token, best first."""
        if self.expert_bias is not None:
            scores_NE = scores_NE + self.expert_bias
        if self.top_groups < self.n_groups:
            scores_NGE = rearrange(scores_NE, "n (g e) -> n g e", g=self.n_groups)
            best = scores_NGE.topk(min(2, scores_NGE.shape[-1]), dim=-1).values.sum(dim=-1)
            chosen_NG = torch.zeros_like(best, dtype=torch.bool).scatter_(
                1, best.topk(self.top_groups, dim=-1).indices, True
            )
            scores_NGE = scores_NGE.masked_fill(~chosen_NG[..., None], -torch.inf)
            scores_NE = rearrange(scores_NGE, "n g e -> n (g e)")
        return scores_NE.topk(self.top_k, dim=-1).indices


def check_choice(n_experts: int, top_k: int, n_groups: int, top_groups: int) -> None:
    """ValueError when a token cannot choose top_k experts."""
    if n_experts < 1 or not 1 <= top_k <= n_experts:
        raise ValueError(
            f"top_k: got top_k={top_k} of n_experts={n_experts}, expected 1 <= top_k <= n_experts; "
            "set channel.top_k or channel.n_experts"
        )
    if n_groups < 1 or n_experts % n_groups:
        raise ValueError(
            f"n_groups: got n_groups={n_groups} for n_experts={n_experts}, expected a divisor; "
            "set channel.n_groups or channel.n_experts"
        )
    if not 1 <= top_groups <= n_groups:
        raise ValueError(
            f"top_groups: got top_groups={top_groups} of n_groups={n_groups}, expected 1 <= "
            "top_groups <= n_groups; set channel.top_groups or channel.n_groups"
        )
    reachable = top_groups * (n_experts // n_groups)
    if reachable < top_k:
        raise ValueError(
            f"top_groups: got top_groups={top_groups} groups of {n_experts // n_groups} experts, "
            f"which is {reachable}, expected at least top_k={top_k}; raise channel.top_groups"
        )


def check_weights(score: str, top_k: int, renormalise: bool, noise: float) -> None:
    """ValueError for an unknown score, and where no gradient would reach the router."""
    if score not in SCORES:
        raise ValueError(
            f"score: got {score!r}, expected one of {', '.join(SCORES)}; set channel.score"
        )
    if score == "softmax_after" and not renormalise:
        raise ValueError(
            "renormalise: got false with score=softmax_after, whose weights always sum to one, "
            "expected true; set channel.renormalise=true or channel.score=softmax_before"
        )
    if top_k == 1 and renormalise:
        raise ValueError(
            "renormalise: got true with top_k=1, where every weight is one and the router learns "
            "nothing, expected false; set channel.renormalise=false, score other than "
            "softmax_after, or channel.top_k > 1"
        )
    if noise < 0:
        raise ValueError(f"noise: got {noise}, expected >= 0; set channel.noise")


def balance_loss(probs_BTE: Tensor, loads_BE: Tensor) -> Tensor:
    """E sum_e f_e P_e, 1 when all experts have equal shares: f_e share of the choices that fell on
    e, P_e mean probability; mean over B. Switch eq. 4; DeepSeek-V3 eq. 17 to 20 with a row per
    sequence. The shares carry no gradient."""
    shares_BE = loads_BE / loads_BE.sum(dim=-1, keepdim=True)
    return probs_BTE.shape[-1] * (shares_BE * probs_BTE.mean(dim=1)).sum(dim=-1).mean()


def router_z_loss(logits_NE: Tensor) -> Tensor:
    """Mean of (log sum_e exp l_e)^2: ST-MoE, arXiv:2202.08906, eq. 5."""
    return logits_NE.logsumexp(dim=-1).square().mean()


def relative_entropy(probs_NE: Tensor) -> Tensor:
    """Entropy over the logarithm of E, mean over rows: 1 is even, 0 is one expert."""
    entropy_N = torch.special.entr(probs_NE).sum(dim=-1)
    return entropy_N.mean() / math.log(max(probs_NE.shape[-1], 2))
