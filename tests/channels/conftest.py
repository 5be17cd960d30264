"""A plain channel, and broken copies of it, each of which one clause of the contract must catch."""

import pytest
import torch

from llmtrain.channels.base import Channel
from llmtrain.model.linear import Linear


class Plain(Channel):
    """y = W2 tanh(W1 x), and a buffer that moves with the mean of y."""

    def __init__(self, d_model, *, layer_idx, n_layers, init_std=0.3):
        super().__init__()
        self.up = Linear(d_model, 3 * d_model, init_std=init_std)
        self.down = Linear(3 * d_model, d_model, init_std=init_std)
        self.gain = torch.nn.Parameter(torch.empty(d_model))
        self.register_buffer("mean", torch.zeros(()))

    def reset_parameters(self):
        torch.nn.init.ones_(self.gain)
        torch.nn.init.zeros_(self.mean)

    def forward(self, x_BTD, ctx):
        y_BTD = self.down(self.up(x_BTD).tanh()) * self.gain.to(x_BTD.dtype)
        exact_BTD = y_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        total = exact_BTD.detach().sum()
        aux = {"metric/mean": total / exact_BTD.numel(), "sum/total": total}
        return y_BTD, aux | {"loss/square": 0.01 * exact_BTD.square().mean()}

    def after_step(self, sums):
        self.mean += sums["total"].to(self.mean.dtype)
        return {"metric/total": sums["total"]}

    def flops_per_token(self):
        return self.up.flops_per_token() + self.down.flops_per_token()


class MixesTokens(Plain):
    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD - 0.01 * x_BTD.mean(dim=1, keepdim=True), ctx)


class ReadsPositions(Plain):
    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD + ctx.positions_BT[..., None], ctx)


class NeverFilled(Plain):
    def reset_parameters(self):
        torch.nn.init.ones_(self.gain)


class LeavesOneOut(Plain):
    def forward(self, x_BTD, ctx):
        return self.down(self.up(x_BTD).tanh()), {}


class CountsTooLittle(Plain):
    def flops_per_token(self):
        return self.up.flops_per_token()


class RoundsHard(Plain):
    def forward(self, x_BTD, ctx):
        coarse = torch.float8_e5m2 if x_BTD.dtype == torch.bfloat16 else x_BTD.dtype
        return super().forward(x_BTD.to(coarse).to(x_BTD.dtype), ctx)


class BreaksTheGraph(Plain):
    def forward(self, x_BTD, ctx):
        return super().forward(x_BTD * (2.0 if x_BTD.sum().item() < 0 else 1.0), ctx)


class TakesAnything(Plain):
    def __init__(self, d_model, **knobs):
        super().__init__(d_model, layer_idx=0, n_layers=1)


class SumsInBfloat16(Plain):
    def forward(self, x_BTD, ctx):
        y_BTD, aux = super().forward(x_BTD, ctx)
        return y_BTD, {key: value.to(x_BTD.dtype) for key, value in aux.items()}


class MovesOnASkippedStep(Plain):
    def after_step(self, sums):
        self.mean += 1.0
        return super().after_step(sums)


@pytest.fixture(scope="session")
def toy_channels():
    """Class name -> class."""
    return {toy.__name__: toy for toy in (Plain, *Plain.__subclasses__())}
