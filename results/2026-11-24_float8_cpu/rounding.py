"""What each rounding to float8 does to a loss curve: a small model trained in float32, with some of
the factors of its linear layers' products rounded to float8 and back.

    python rounding.py TEXT [TEXT ...] --rounds x w --set model.init_std=0.08    (2 minutes a core)

TEXT: files whose bytes are the tokens. --rounds: which factors are rounded, of

    x    activations, e4m3, in the forward product and in the weight's gradient
    w    weights, e4m3, in the forward product and in the input's gradient
    dy   gradients of outputs, e5m2, in both backward products

Prints the mean training loss of each quarter and the held-out loss, without rounding, nats a byte.
Products are in float32, so nothing but the rounding differs from a float32 run of the same seed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.nn.functional as F
from llmtrain_kernels.float8 import E4M3, E5M2, quantise
from torch import Tensor

from llmtrain import build
from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.model.linear import Linear
from llmtrain.train.copies import block_linears

WIDTH, TOKENS, ROWS, STEPS, LR, VOCAB = 256, 256, 8, 300, 1e-3, 320
HELD_OUT = 2_000_000  # bytes at the end
DTYPES = {"x": E4M3, "w": E4M3, "dy": E5M2}
MODEL = (
    f"model=tiny model.d_model={WIDTH} model.n_layers=2 model.n_heads=4 model.n_kv_heads=2 "
    f"model.ffn_hidden=896 model.vocab_size={VOCAB} tokenizer.vocab_size={VOCAB} "
    f"model.max_seq_len={TOKENS} train.seq_len={TOKENS} train.micro_batch={ROWS} "
    f"train.global_batch_tokens={ROWS * TOKENS} train.total_tokens={STEPS * ROWS * TOKENS}"
)


class Rounded(torch.autograd.Function):
    """x_ND W^T with the chosen factors rounded."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, w_FD: Tensor, chosen: Sequence[str]) -> Tensor:
        x_ND, w_FD = rounded(x_ND, "x", chosen), rounded(w_FD, "w", chosen)
        ctx.save_for_backward(x_ND, w_FD)
        ctx.chosen = chosen
        return x_ND @ w_FD.t()

    @staticmethod
    def backward(ctx, dy_NF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, w_FD = ctx.saved_tensors
        dy_NF = rounded(dy_NF, "dy", ctx.chosen)
        return dy_NF @ w_FD, dy_NF.t() @ x_ND, None


def rounded(z: Tensor, name: str, chosen: Sequence[str]) -> Tensor:
    if name not in chosen:
        return z
    made = quantise(z, DTYPES[name], "tensorwise")
    return made.values.float() * made.inverse


def round_products(model: torch.nn.Module, chosen: Sequence[str]) -> None:
    """Of the layers that train.precision=fp8 takes, while they train."""

    def computing(layer: Linear):
        def forward(x: Tensor) -> Tensor:
            if not layer.training:
                return F.linear(x, layer.weight)
            y_NF = Rounded.apply(x.flatten(0, -2), layer.weight, chosen)
            return y_NF.unflatten(0, x.shape[:-1])

        return forward

    for layer in block_linears(model).values():
        layer.forward = computing(layer)


def batch(text: np.ndarray, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    starts = generator.integers(0, len(text) - TOKENS - 1, ROWS)
    rows = np.stack([text[at : at + TOKENS + 1] for at in starts]).astype(np.int64)
    return torch.from_numpy(rows[:, :-1]), torch.from_numpy(rows[:, 1:])


def loss_of(model: torch.nn.Module, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    hidden_BTD = model(tokens_BT, SequenceContext.dense(*tokens_BT.shape)).hidden_BTD
    return F.cross_entropy(model.logits(hidden_BTD).flatten(0, 1), targets_BT.flatten())


def rate(step: int) -> float:
    """Of LR: warmup over a tenth, half a cosine down to a tenth."""
    warmup = STEPS // 10
    done = max(0, step - warmup) / (STEPS - warmup)
    return min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--rounds", nargs="*", choices=DTYPES, default=[])
    parser.add_argument("--set", nargs="*", default=[], help="overrides of the configuration")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text = np.frombuffer(b"".join(path.read_bytes() for path in options.text), np.uint8)
    torch.manual_seed(options.seed)
    config = compose("train", [*MODEL.split(), *options.set])
    model = build.build_model(config, vocab_size=VOCAB, device="cpu")
    round_products(model, options.rounds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator, losses = np.random.default_rng(options.seed), []
    for _ in range(STEPS):
        loss = loss_of(model, *batch(text[:-HELD_OUT], generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    generator = np.random.default_rng(0)
    with torch.no_grad():
        batches = [batch(text[-HELD_OUT:], generator) for _ in range(40)]
        held_out = fmean(loss_of(model, *rows).item() for rows in batches)
    quarters = [fmean(losses[i : i + STEPS // 4]) for i in range(0, STEPS, STEPS // 4)]
    shown = ", ".join(f"{value:.4f}" for value in quarters)
    name = f"{' '.join(options.rounds) or 'nothing'} {' '.join(options.set)} seed {options.seed}"
    print(f"{name}: quarters {shown}; held out {held_out:.4f}", flush=True)


if __name__ == "__main__":
    main()
