"""How large a model's inner vectors are, and how far a few steps of training move them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain import build
from llmtrain.context import SequenceContext
from llmtrain.model.language_model import LanguageModel

from .arms import VOCAB, configuration

# Place -> what is measured there, of fixed tokens.
PLACES = ("mixer", "channel", "hidden", "logits")


def text(generator: torch.Generator, rows: int, tokens: int) -> Tensor:
    """Rows [B, T] of a Markov chain in which each token has four likely successors."""
    successors = torch.randint(VOCAB, (VOCAB, 4), generator=torch.Generator().manual_seed(1))
    row = [torch.randint(VOCAB, (rows,), generator=generator)]
    for _ in range(tokens - 1):
        choice = torch.randint(4, (rows,), generator=generator)
        row.append(successors[row[-1], choice])
    return torch.stack(row, dim=1)


@torch.no_grad()
def look(model: LanguageModel, tokens_BT: Tensor) -> dict[str, Tensor]:
    """The vectors of every place: outputs of the last block's mixer and channel, what the head
    reads, logits."""
    seen: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, given, result: seen.__setitem__(name, result[0].detach().clone())

    block = model.stack.layers[-1]
    hooks = [block.mixer.register_forward_hook(keep("mixer"))]
    if not block.channel.adds_nothing:
        hooks.append(block.channel.register_forward_hook(keep("channel")))
    model.eval()
    hidden_BTD = model(tokens_BT, SequenceContext.dense(*tokens_BT.shape)).hidden_BTD
    model.train()
    for hook in hooks:
        hook.remove()
    return seen | {"hidden": hidden_BTD, "logits": model.logits(hidden_BTD)}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def loss_of(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens, with the auxiliary losses."""
    output = model(tokens_BT[:, :-1], SequenceContext.dense(len(tokens_BT), tokens_BT.shape[1] - 1))
    logits = model.logits(output.hidden_BTD)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 1:].flatten())
    return loss + sum(value for key, value in output.aux.items() if key.startswith("loss/"))


def start(
    arm: str, width: int, *, mup: bool, seed: int, lr: float, layers: int
) -> tuple[LanguageModel, torch.optim.Optimizer]:
    config = configuration(arm, width, mup=mup, lr=lr, seed=seed, layers=layers)
    model = build.build_model(config, vocab_size=VOCAB)
    return model, build.part(config["optimizer"], "optimizer").build(model)


def losses(
    arm: str, width: int, *, mup: bool, seed: int, steps: int, lr: float, layers: int = 2
) -> list[float]:
    """The loss before every step of a training with a constant learning rate; inf from where it is
    not finite."""
    model, optimizer = start(arm, width, mup=mup, seed=seed, lr=lr, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(steps):
        loss = loss_of(model, text(generator, 16, 33))
        if not torch.isfinite(loss):
            return found + [math.inf] * (steps - len(found))
        found.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found


def course(
    arm: str,
    width: int,
    *,
    mup: bool,
    seed: int,
    steps: int,
    lr: float,
    layers: int = 2,
    shape: tuple[int, int] = (8, 33),
) -> list[dict[str, float]]:
    """A row for each step, 0 included: place -> rms, place + "_change" -> rms of the change since
    step 0, and loss."""
    model, optimizer = start(arm, width, mup=mup, seed=seed, lr=lr, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    probe_BT = text(generator, *shape)[:, :-1]
    first, rows = look(model, probe_BT), []
    for step in range(steps + 1):
        now = look(model, probe_BT)
        row = {place: rms(x) for place, x in now.items()}
        row |= {f"{place}_change": rms(x - first[place]) for place, x in now.items()}
        loss = loss_of(model, text(generator, *shape))
        rows.append({**row, "loss": loss.item()})
        if step < steps:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return rows


def slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """Of log size over log width, by least squares."""
    x = [math.log2(width) for width in widths]
    y = [math.log2(max(size, 1e-30)) for size in sizes]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)
