"""Generation: prompts in, continuations out, by prefill and then one token at a time.

Prompts of equal length are read together, so that no row is ever padded and every mixer is exact.
All rows then advance in one batch, each at its own position. A row leaves the batch at a stop token
or when it has its tokens.

Sampling draws one uniform number a token from a generator of the prompt's own and inverts the
cumulative distribution. What a prompt yields therefore depends on (seed, prompt, how many times the
same prompt came before it), not on the other prompts, the batch size or the device, up to rounding
of the logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.context import SequenceContext
from llmtrain.model.init import keyed_seed
from llmtrain.model.language_model import LanguageModel, ModelState
from llmtrain.model.position import Learned


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
    batch: int = 32,
) -> list[list[int]]:
    """The new tokens of every prompt, a final stop token included.

    temperature: 0 takes the likeliest token; otherwise logits are divided by it. top_k: only the k
    likeliest tokens. top_p: only the likeliest tokens that together have at least that probability
    (Holtzman et al. 2019, arXiv:1904.09751), after top_k. batch: rows at once.
    ValueError for values out of range, empty prompts, and tokens that the model does not have.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p, batch)
    uniforms_PT = draw_uniforms(prompts, max_new_tokens, seed)
    results: list[list[int]] = [[] for _ in prompts]
    if max_new_tokens == 0:
        return results
    stops = frozenset(stop_tokens)
    # Neighbours in length share prefills.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        logits_BO, state = prefill(model, [prompts[i] for i in chosen], max_new_tokens)
        uniforms_BT = uniforms_PT[chosen].to(logits_BO.device)
        for t in range(max_new_tokens):
            if temperature == 0:
                tokens_B = logits_BO.argmax(dim=-1)
            else:
                tokens_B = sample(logits_BO, uniforms_BT[:, t], temperature, top_k, top_p)
            tokens = tokens_B.tolist()
            for i, token in zip(chosen, tokens):
                results[i].append(token)
            going = [row for row, token in enumerate(tokens) if token not in stops]
            if not going or t + 1 == max_new_tokens:
                break
            if len(going) < len(chosen):
                index_B = torch.tensor(going, device=tokens_B.device)
                chosen = [chosen[row] for row in going]
                tokens_B, uniforms_BT = tokens_B[index_B], uniforms_BT[index_B]
                state = state.select(index_B)
            logits_BO, state = model.step(tokens_B, state)
    return results


def prefill(
    model: LanguageModel, prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[Tensor, ModelState]:
    """Read prompts that are sorted by length. Returns the logits_BO after each, and the state."""
    device = model.embedding.weight.device
    max_tokens = len(prompts[-1]) + new_tokens
    logits, states = [], []
    start = 0
    while start < len(prompts):
        length = len(prompts[start])
        rows = [list(p) for p in prompts[start:] if len(p) == length]
        tokens_BT = torch.tensor(rows, device=device)
        ctx = SequenceContext.dense(len(rows), length, device=device)
        hidden_BTD, state, _ = model(tokens_BT, ctx, model.init_state(len(rows), max_tokens))
        logits.append(model.logits(hidden_BTD[:, -1]))
        states.append(state)
        start += len(rows)
    return torch.cat(logits), ModelState.cat(states)


def sample(
    logits_BO: Tensor, uniform_B: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """tokens_B drawn by inverting the cumulative distribution of the allowed tokens.

    uniform_B: float64 in [0, 1). Probabilities are float64: a float32 running sum over a large
    vocabulary would move the boundaries between tokens.
    """
    _, cumulative_BO, last_B1, index_BO = nucleus(logits_BO, temperature, top_k, top_p)
    mass_B1 = cumulative_BO.gather(1, last_B1)
    rank_B1 = (cumulative_BO <= uniform_B[:, None] * mass_B1).sum(dim=-1, keepdim=True)
    return index_BO.gather(1, rank_B1.minimum(last_B1)).squeeze(1)


def distribution(
    logits_BO: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """p_BO: float64, the probability of every token that sample() draws from; 0 or 1 when
    temperature is 0."""
    if temperature == 0:
        return F.one_hot(logits_BO.argmax(dim=-1), logits_BO.shape[-1]).double()
    p_BO, _, last_B1, index_BO = nucleus(logits_BO, temperature, top_k, top_p)
    rank_O = torch.arange(p_BO.shape[1], device=p_BO.device)
    p_BO = p_BO.masked_fill(rank_O > last_B1, 0.0)
    p_BO = p_BO / p_BO.sum(dim=-1, keepdim=True)
    zeros_BO = torch.zeros_like(logits_BO, dtype=torch.float64)
    return zeros_BO.scatter(1, index_BO[:, : p_BO.shape[1]], p_BO)


def nucleus(
    logits_BO: Tensor, temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities, likeliest first, of top_k tokens, their running sum, the rank of the last
    token that top_p allows, and the tokens of all ranks. float64."""
    sorted_BO, index_BO = logits_BO.double().sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        sorted_BO = sorted_BO[:, :top_k]
    p_BO = (sorted_BO / temperature).softmax(dim=-1)
    cumulative_BO = p_BO.cumsum(dim=-1)
    last_B1 = (cumulative_BO < (1.0 if top_p is None else top_p)).sum(dim=-1, keepdim=True)
    return p_BO, cumulative_BO, last_B1.clamp(max=cumulative_BO.shape[1] - 1), index_BO


def draw_uniforms(prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> Tensor:
    """uniforms_PT: float64 [prompts, tokens] in [0, 1), each row from its own generator."""
    seen: Counter[tuple[int, ...]] = Counter()
    uniforms_PT = torch.empty(len(prompts), tokens, dtype=torch.float64)
    for row, prompt in zip(uniforms_PT, map(tuple, prompts)):
        generator = torch.Generator().manual_seed(keyed_seed(seed, f"{prompt}/{seen[prompt]}"))
        seen[prompt] += 1
        row.uniform_(generator=generator)
    return uniforms_PT


def check(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    batch: int,
) -> None:
    """ValueError for arguments that generate() cannot follow."""
    ranges = (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, ">= 0"),
        ("temperature", temperature, temperature >= 0, ">= 0"),
        ("top_k", top_k, top_k is None or top_k >= 1, ">= 1 or null"),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1, or null"),
        ("batch", batch, batch >= 1, ">= 1"),
    )
    for name, got, good, expected in ranges:
        if not good:
            raise ValueError(f"generate: got {name}={got}, expected {expected}; set {name}")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            f"generate: got top_k={top_k}, top_p={top_p} with temperature=0, where they have no "
            "effect, expected null; set temperature above 0 to sample"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(
                f"generate: prompt {i} is empty, expected at least one token; "
                "begin it with the tokenizer's end-of-text token"
            )
        worst = max(prompt, key=lambda token: token if token >= 0 else float("inf"))
        if not 0 <= worst < model.vocab_size:
            raise ValueError(
                f"generate: prompt {i} holds token {worst}, expected 0 to {model.vocab_size - 1}; "
                "use the tokenizer that the model was trained with"
            )
        total, position = len(prompt) + max_new_tokens, model.position
        if isinstance(position, Learned) and total > position.max_seq_len:
            raise ValueError(
                f"generate: prompt {i} and its continuation have {total} tokens, expected at most "
                f"the {position.max_seq_len} positions that were learned; shorten either"
            )
