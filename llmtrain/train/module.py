"""TrainModule: the model and its objective as one module, from a micro-batch to a loss.

It is what DeepSpeed wraps and torch.compile sees. Its sums are over the tokens of the micro-batch;
the engine divides by the tokens of the whole step, so that every token of a step weighs the same,
however ranks and micro-batches cut it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmtrain.channels.base import Channel
from llmtrain.context import SequenceContext
from llmtrain.data.batch import MicroBatch

# Order of the entries of MicroOutput.sums.
SUMS = ("loss", "ce", "weight", "bytes")


class TrainModule(nn.Module):
    """forward(micro) -> (loss_sum, sums, aux).

    loss_sum: scalar with gradient, sum over the tokens. sums: float64 [len(SUMS)], detached:
    loss, cross-entropy (nats), token weights, bytes of the target tokens. aux: detached; scalars,
    and what "sum/<place>/<name>" adds over a step (llmtrain/channels/base.py).
    token_bytes: bytes of the text of each token id, [O].
    """

    def __init__(self, model: nn.Module, objective: nn.Module, token_bytes: Tensor):
        super().__init__()
        self.model = model
        self.objective = objective
        self.register_buffer("token_bytes", token_bytes.to(torch.float32), persistent=False)
        self.compute: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]] = self.sum_losses

    def sum_losses(
        self, tokens_BT: Tensor, targets_BT: Tensor, weights_BT: Tensor, ctx: SequenceContext
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        out = self.objective(self.model, tokens_BT, targets_BT, weights_BT, ctx)
        text_bytes = (self.token_bytes[targets_BT] * weights_BT).sum()
        parts = (out.loss_sum, out.ce_sum, out.weight_sum, text_bytes)
        sums = torch.stack([part.detach().to(torch.float64) for part in parts])
        aux = {name: value.detach() for name, value in out.aux.items()}
        return out.loss_sum, sums, aux

    def forward(self, micro: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        return self.compute(micro.tokens_BT, micro.targets_BT, micro.weights_BT, micro.ctx)

    def expect_gradient(self, value: float) -> None:
        """Tell the objective what loss_sum will be multiplied by before the backward pass."""
        self.objective.expected_gradient = value

    def after_step(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Call after_step of every channel that summed something over the step.

        sums: "sum/<place>/<name>" -> total, the place being l<block> of the stack or mtp<j>
        of multi-token prediction. Returns their metrics, "metric/<place>/<name>".
        """
        own: dict[str, dict[str, Tensor]] = {}
        for key, value in sums.items():
            _, place, name = key.split("/", 2)
            own.setdefault(place, {})[name] = value
        metrics = {}
        for place, values in own.items():
            for key, value in self.channel_at(place).after_step(values).items():
                metrics[f"metric/{place}/{key.removeprefix('metric/')}"] = value
        return metrics

    def channel_at(self, place: str) -> Channel:
        if place.startswith("mtp"):
            return self.model.mtp[int(place.removeprefix("mtp"))].block.channel
        return self.model.stack.blocks[int(place.removeprefix("l"))].channel

    def compile_model(self) -> None:
        """Let torch.compile take the whole computation as one graph.

        Only the inner function, so that hooks around this module's call stay outside the graph.
        """
        self.compute = torch.compile(self.sum_losses, dynamic=False)

    def compile_blocks(self) -> None:
        """Let torch.compile take each block: equal blocks share their code, so it starts sooner.

        And the step from logits to losses, which would else keep float32 copies of the logits. A
        fused backend of the objective has its own kernels and is left as it is.
        """
        further = [module.block for module in self.model.mtp or ()]
        for block in [*self.model.stack.blocks, *further]:
            block.compile(dynamic=False)
        self.objective.token_loss.compile(dynamic=False)
