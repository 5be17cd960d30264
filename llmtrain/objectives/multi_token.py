"""Multi-token prediction: next-token prediction, and `depth` further tokens by modules in a chain.

    loss_sum = next-token loss + loss_weight / depth * sum_(k=1..depth) loss_k
    loss_k = sum_i w_(i+k) (ce(head(h_i^k), t_(i+k+1)) + z_loss * lse^2)

DeepSeek-AI 2024 (arXiv:2412.19437), section 2.2, eq. 24 and 25, with eq. 21 to 23 in
llmtrain/model/multi_token.py. Position i counts at depth k when the tokens i .. i + k + 1 lie in
one document and in the row; a token outside of it is not even an input. As in the paper the
trainer divides every loss_k by the same number of tokens, not by the positions that count.

A step costs depth times a block, a head and 4 D^2 FLOPs a token more, thrice for the backward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.context import SequenceContext
from llmtrain.model.language_model import LanguageModel
from llmtrain.objectives.causal import Causal, LossOutput


class MultiToken(Causal):
    """depth: tokens predicted beyond the next one, and modules. loss_weight: lambda of eq. 25;
    DeepSeek-V3 took 0.3, and 0.1 in the last third of its tokens. The others as in Causal.

    The model's own head gives ce_sum. Aux: "metric/mtp<j>/ce" is the mean cross entropy of module
    j = k - 1 over the positions that count; what its block hands up becomes "<kind>/mtp<j>/<name>".
    """

    def __init__(
        self,
        *,
        depth: int = 1,
        loss_weight: float = 0.3,
        z_loss: float = 0.0,
        chunk_tokens: int | None = None,
        backend: str = "auto",
    ):
        super().__init__(z_loss=z_loss, chunk_tokens=chunk_tokens, backend=backend)
        if depth < 1:
            raise ValueError(
                f"depth: got {depth}, expected >= 1; set objective.depth, or use objective=causal"
            )
        if loss_weight <= 0:
            raise ValueError(
                f"loss_weight: got {loss_weight}, expected > 0; set objective.loss_weight, or use "
                "objective=causal"
            )
        self.depth, self.loss_weight = depth, loss_weight

    def forward(
        self,
        model: LanguageModel,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        ctx: SequenceContext,
    ) -> LossOutput:
        self.check(model, tokens_BT.shape[1])
        hidden_BTD, _, aux = model(tokens_BT, ctx)
        sums = self.head_sums(model, hidden_BTD, targets_BT, weights_BT)
        out = self.total(sums, weights_BT.sum(), aux)
        loss_sum, aux, share = out.loss_sum, dict(out.aux), self.loss_weight / self.depth
        for j, module in enumerate(model.mtp):
            k = j + 1
            hidden_BTD, _, own = model.look_ahead(
                module, hidden_BTD, ahead(tokens_BT, k), ctx, known_BT=together(tokens_BT, ctx, k)
            )
            counts_BT = ahead(weights_BT, k) * together(tokens_BT, ctx, k + 1)
            further, ce_sum, _ = self.head_sums(
                model, hidden_BTD, ahead(targets_BT, k), counts_BT, share=share
            )
            loss_sum = loss_sum + share * further
            # no position counts where all documents are short: the mean is then 0
            mean = ce_sum / counts_BT.sum().clamp(min=torch.finfo(counts_BT.dtype).tiny)
            aux[f"metric/mtp{j}/ce"] = mean.detach()
            for key, value in own.items():
                kind, name = key.split("/", 1)
                aux[f"{kind}/mtp{j}/{name}"] = value
                if kind == "loss":
                    loss_sum = loss_sum + out.weight_sum * value
        return out._replace(loss_sum=loss_sum, aux=aux)

    def check(self, model: LanguageModel, tokens: int) -> None:
        """ValueError when the model has other modules, or no row is long enough for the last."""
        modules = 0 if model.mtp is None else len(model.mtp)
        if modules != self.depth:
            raise ValueError(
                f"multi_token: got depth={self.depth} for a model of {modules} modules, expected "
                "as many; build the model from the configuration that has the objective"
            )
        check_depth(self.depth, tokens)


def check_depth(depth: int, tokens: int) -> None:
    """ValueError when rows of that many tokens hold no place where the last module counts."""
    if depth + 2 > tokens:
        raise ValueError(
            f"objective.depth: got {depth} with rows of {tokens} tokens, expected at most "
            f"{max(tokens - 2, 0)}, so that a token, the {depth} after it and the one to predict "
            "lie in one row; lower objective.depth or raise train.seq_len"
        )


def ahead(x_BT: Tensor, places: int) -> Tensor:
    """What stands that many places later; 0 beyond the row."""
    return F.pad(x_BT[:, places:], (0, places))


def together(tokens_BT: Tensor, ctx: SequenceContext, places: int) -> Tensor:
    """bool [B, T]: whether the token that many places later is in the row and in the document."""
    doc_ids_BT = torch.zeros_like(tokens_BT) if ctx.doc_ids_BT is None else ctx.doc_ids_BT
    return F.pad(doc_ids_BT[:, places:], (0, places), value=-1) == doc_ids_BT
