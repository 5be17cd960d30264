"""A recurrent mixer to prove that the contract suite is not made for attention alone, and broken
copies of it, each of which one clause must catch."""

import pytest
import torch

from llmtrain.mixers.base import Mixer
from llmtrain.model.linear import Linear


class Recurrence(Mixer):
    """u_t = x_t + x_(t-1);  s_t = g_t s_(t-1) + W_v u_t;  y_t = W_o s_t; both stop at documents."""

    def __init__(self, d_model, *, layer_idx, n_layers, init_std=0.2):
        super().__init__()
        self.gate = Linear(d_model, d_model, init_std=init_std)
        self.value = Linear(d_model, d_model, init_std=init_std)
        self.out = Linear(d_model, d_model, init_std=init_std)
        self.d_model = d_model

    def forward(self, x_BTD, ctx, state=None):
        batch, tokens, _ = x_BTD.shape
        start = state or self.init_state(
            batch, max_tokens=tokens, device=x_BTD.device, dtype=x_BTD.dtype
        )
        s_BD, last_BD, outputs = start["s"], start["last"][:, 0], []
        for t in range(tokens):
            if ctx.doc_ids_BT is not None and t > 0:
                same_B = ctx.doc_ids_BT[:, t] == ctx.doc_ids_BT[:, t - 1]
                s_BD, last_BD = (torch.where(same_B[:, None], z, 0) for z in (s_BD, last_BD))
            s_BD = self.next(x_BTD[:, t] + last_BD, s_BD)
            last_BD = x_BTD[:, t]
            outputs.append(s_BD)
        y_BTD = self.out(torch.stack(outputs, dim=1))
        return y_BTD, None if state is None else {"s": s_BD, "last": last_BD[:, None]}

    def next(self, u_BD, s_BD):
        return self.gate(u_BD).sigmoid() * s_BD + self.value(u_BD)

    def init_state(self, batch, *, max_tokens, device, dtype):
        zeros = torch.zeros(batch, 1, self.d_model, device=device, dtype=dtype)
        return {"s": zeros[:, 0], "last": zeros}

    def step(self, x_BD, ctx, state):
        s_BD = self.next(x_BD + state["last"][:, 0], state["s"])
        return self.out(s_BD), {"s": s_BD, "last": x_BD[:, None]}

    def flops_per_token(self, tokens):
        return 3 * self.out.flops_per_token()

    def state_bytes(self, tokens, dtype=torch.bfloat16):
        return 2 * self.d_model * dtype.itemsize


class PeeksAhead(Recurrence):
    def forward(self, x_BTD, ctx, state=None):
        y_BTD, state = super().forward(x_BTD, ctx, state)
        return y_BTD + x_BTD.roll(-1, dims=1), state


class CrossesDocuments(Recurrence):
    def forward(self, x_BTD, ctx, state=None):
        one = type(ctx).dense(*x_BTD.shape[:2], prefix_tokens=ctx.prefix_tokens)
        return super().forward(x_BTD, one, state)


class StepsDifferently(Recurrence):
    def step(self, x_BD, ctx, state):
        return super().step(x_BD, ctx, {**state, "last": torch.zeros_like(state["last"])})


class ForgetsItsPrefix(Recurrence):
    def forward(self, x_BTD, ctx, state=None):
        state = None if state is None else {k: torch.zeros_like(v) for k, v in state.items()}
        return super().forward(x_BTD, ctx, state)


class MixesRows(Recurrence):
    def step(self, x_BD, ctx, state):
        y_BD, state = super().step(x_BD, ctx, state)
        return y_BD - y_BD.mean(dim=0) + y_BD[:1], state


class CountsTooLittle(Recurrence):
    def flops_per_token(self, tokens):
        return 2 * self.out.flops_per_token()


class SizesTooLittle(Recurrence):
    def state_bytes(self, tokens, dtype=torch.bfloat16):
        return self.d_model * dtype.itemsize


class NeverFilled(Recurrence):
    def __init__(self, d_model, *, layer_idx, n_layers, init_std=0.2):
        super().__init__(d_model, layer_idx=layer_idx, n_layers=n_layers, init_std=init_std)
        self.gain = torch.nn.Parameter(torch.ones(d_model))

    def reset_parameters(self):
        pass


class RoundsHard(Recurrence):
    def next(self, u_BD, s_BD):
        coarse = torch.float8_e5m2 if u_BD.dtype == torch.bfloat16 else u_BD.dtype
        return super().next(u_BD, s_BD).to(coarse).to(u_BD.dtype)


class BreaksTheGraph(Recurrence):
    def forward(self, x_BTD, ctx, state=None):
        scale = 2.0 if x_BTD.sum().item() < 0 else 1.0
        return super().forward(x_BTD * scale, ctx, state)


class ClaimsPositions(Recurrence):
    uses_positions = True
    rotary_width = 4


class TakesAnything(Recurrence):
    def __init__(self, d_model, **knobs):
        super().__init__(d_model, layer_idx=0, n_layers=1)


@pytest.fixture(scope="session")
def toy_mixers():
    """Class name -> class."""
    toys = (Recurrence, *Recurrence.__subclasses__())
    return {toy.__name__: toy for toy in toys}
