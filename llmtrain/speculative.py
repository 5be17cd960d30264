"""Self-speculative decoding: modules of multi-token prediction draft, the model checks at once.

    x_j ~ q_j, drafted one after the other; one forward pass of the model gives p_1 .. p_(J+1)
    x_j is kept with probability min(1, p_j(x_j) / q_j(x_j)), as long as those before it are
    the first one that is not gives way to a draw from max(0, p_j - q_j), normalised
    when all are kept, one more is drawn from p_(J+1)

Leviathan et al. 2023 (arXiv:2211.17192), algorithm 1: whatever q is, the text is distributed as if
drawn from p token by token. p and q are what temperature, top_k and top_p leave; at temperature 0
both are certain of one token, and the text is the greedy one, up to rounding: reading several
tokens at once adds in another order than reading one, and may tip two logits that are nearly equal.

Rows are decoded one by one. A recurrent state cannot go back, so the model checks on a copy of its
state. When a draft fails, the tokens since that state are read again together with the next drafts,
not in a pass of their own, unless they have become too many.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.context import SequenceContext
from llmtrain.generate import check, distribution
from llmtrain.mixers.base import State
from llmtrain.model.init import keyed_seed
from llmtrain.model.language_model import LanguageModel, ModelState

MAX_UNREAD = 16  # accepted tokens that are read again with the next drafts, at most


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """What speculation gave. tokens: made; forwards: passes of the model for them, the prompt's
    included (without speculation as many as tokens)."""

    tokens: int
    forwards: int
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / max(self.forwards, 1)

    def describe(self) -> str:
        return (
            f"speculation: {self.accepted} of {self.drafted} drafted tokens accepted "
            f"({self.acceptance:.1%}), {self.tokens_per_forward:.2f} tokens a forward pass"
        )


@torch.no_grad()
def speculate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    drafts: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int = 0,
) -> tuple[list[list[int]], Speculation]:
    """The new tokens of every prompt as llmtrain.generate.generate gives them, and what it took.

    drafts: tokens drafted for a forward pass: at most one a module, or any number by a single
    module, which then reads its own hidden vectors (as EAGLE does, arXiv:2401.15077). A sampled
    text depends on (seed, prompt, how many times the same prompt came before), but is another one
    than generate's.
    ValueError as for generate, and for a model that cannot draft that many.
    """
    check(model, prompts, max_new_tokens, temperature, top_k, top_p, batch=1)
    check_drafts(model, drafts)
    stops, seen = frozenset(stop_tokens), Counter[tuple[int, ...]]()
    results, total = [], Counter(tokens=0, forwards=0, drafted=0, accepted=0)
    for prompt in map(tuple, prompts):
        row = Row(
            model,
            prompt,
            drafts=drafts,
            max_new_tokens=max_new_tokens,
            probabilities=lambda x_BO: distribution(x_BO, temperature, top_k, top_p),
            uniform=random.Random(keyed_seed(seed, f"{prompt}/{seen[prompt]}")).random,
        )
        seen[prompt] += 1
        results.append(row.decode(stops) if max_new_tokens else [])
        total.update(row.counts, tokens=len(results[-1]))
    return results, Speculation(**total)


def check_drafts(model: LanguageModel, drafts: int) -> None:
    """ValueError when the model cannot draft that many tokens."""
    modules = 0 if model.mtp is None else len(model.mtp)
    if not modules:
        raise ValueError(
            f"speculate: got {drafts} for a model without modules of multi-token prediction, "
            "expected null; set speculate=null, or train with objective=multi_token"
        )
    if drafts < 1 or drafts > modules > 1:
        raise ValueError(
            f"speculate: got {drafts} for a model of {modules} modules, expected 1 to {modules} "
            "(more only where there is a single module, to be applied repeatedly); set speculate"
        )


class Row:
    """The decoding of one prompt. probabilities: logits_BO -> p_BO; uniform: draws from [0, 1)."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        *,
        drafts: int,
        max_new_tokens: int,
        probabilities: Callable[[Tensor], Tensor],
        uniform: Callable[[], float],
    ):
        self.model, self.prompt, self.text = model, prompt, list(prompt)
        self.drafts, self.max_new_tokens = drafts, max_new_tokens
        self.probabilities, self.uniform = probabilities, uniform
        max_tokens = len(prompt) + max_new_tokens
        self.state = model.init_state(1, max_tokens)
        self.drafter = Drafter(model, drafts=drafts, max_tokens=max_tokens)
        self.read_tokens = 0  # of the text, in the state
        self.counts: Counter[str] = Counter()

    def decode(self, stops: frozenset[int]) -> list[int]:
        hidden_1TD, self.state = self.read(self.text, self.state)
        self.read_tokens = len(self.text)
        self.drafter.follow(hidden_1TD)
        p_1O = self.probabilities(self.model.logits(hidden_1TD[:, -1]))
        new = [draw(p_1O[0], self.uniform())]
        while True:
            for token in new:
                self.text.append(token)
                if token in stops:
                    return self.text[len(self.prompt) :]
            left = self.max_new_tokens + len(self.prompt) - len(self.text)
            if not left:
                return self.text[len(self.prompt) :]
            new = self.advance(min(self.drafts, left - 1))

    def advance(self, count: int) -> list[int]:
        """The next tokens, 1 to count + 1, with that many drafts."""
        drafts, q_JO = self.drafter.draft(self.text, count, self.choose)
        chunk = [*self.text[self.read_tokens :], *drafts]
        copy = self.state.select(self.state.length_B.new_zeros(1)) if count else self.state
        hidden_1TD, state = self.read(chunk, copy)
        hidden_1JD = hidden_1TD[:, -count - 1 :]
        p_JO = self.probabilities(self.model.logits(hidden_1JD)[0])
        accepted, token = judge(drafts, q_JO, p_JO, self.uniform)
        self.counts.update(drafted=count, accepted=accepted)
        self.drafter.follow(hidden_1JD[:, : accepted + 1])
        unread = [*self.text[self.read_tokens :], *drafts[:accepted]]
        if accepted < count and len(unread) <= MAX_UNREAD:
            return [*drafts[:accepted], token]
        if accepted < count:
            _, state = self.read(unread, self.state)
        self.state, self.read_tokens = state, self.read_tokens + len(unread)
        return [*drafts[:accepted], token]

    def read(self, tokens: list[int], state: ModelState) -> tuple[Tensor, ModelState]:
        """The model over tokens that follow those in self.state, of which state is a copy."""
        device = state.length_B.device
        ctx = SequenceContext.dense(1, len(tokens), device=device, prefix_tokens=self.read_tokens)
        out = self.model(torch.tensor([tokens], device=device), ctx, state)
        self.counts["forwards"] += 1
        return out.hidden_BTD, out.state

    def choose(self, logits_BO: Tensor) -> tuple[int, Tensor]:
        """A draft, and the q_BO that it was drawn from."""
        q_BO = self.probabilities(logits_BO)
        return draw(q_BO[0], self.uniform()), q_BO


class Drafter:
    """The modules of one row. Module j (from 0) at position i reads the hidden vector of module
    j - 1 (of the model, for j = 0) at i and the token at i + j + 1.

    Positions whose token is in the text are final: they advance the module's state. The j positions
    after them have drafts for tokens, and are read anew, from a copy of the state, each time.
    """

    def __init__(self, model: LanguageModel, *, drafts: int, max_tokens: int):
        self.model = model
        self.modules = list(model.mtp)[:drafts]
        weight = model.embedding.weight
        self.empty_1TD = weight.new_zeros(1, 0, weight.shape[1], dtype=model.compute_dtype)
        self.states = [
            module.init_state(
                1, max_tokens=max_tokens, device=weight.device, dtype=model.compute_dtype
            )
            for module in self.modules
        ]
        self.positions = [0 for _ in self.modules]  # in the state
        self.inputs = [self.empty_1TD for _ in self.modules]  # final hidden vectors after those

    def follow(self, hidden_1TD: Tensor) -> None:
        """The model's hidden vectors of further tokens of the text."""
        self.inputs[0] = torch.cat([self.inputs[0], hidden_1TD], dim=1)

    def draft(
        self, text: list[int], count: int, choose: Callable[[Tensor], tuple[int, Tensor]]
    ) -> tuple[list[int], Tensor]:
        """count tokens after the text, and q_JO. The model has read all of it but the last token.

        choose: logits_BO -> (token, q_BO).
        """
        drafts, qs = [], [self.empty_1TD.new_zeros(0, self.model.vocab_size).double()]
        tail_1TD = self.empty_1TD  # hidden vectors that rest on drafts
        for j in range(min(count, len(self.modules))):
            final = max(len(text) - 1 - j - self.positions[j], 0)
            last_1TD, self.inputs[j] = self.inputs[j][:, :final], self.inputs[j][:, final:]
            if final:
                last_1TD, self.states[j] = self.run(j, last_1TD, text, self.states[j])
                self.positions[j] += final
                if j + 1 < len(self.modules):
                    self.inputs[j + 1] = torch.cat([self.inputs[j + 1], last_1TD], dim=1)
            tail_1TD = torch.cat([self.inputs[j], tail_1TD], dim=1)
            if tail_1TD.shape[1]:
                copy = clone(self.states[j])
                last_1TD, _ = self.run(j, tail_1TD, [*text, *drafts], copy)
                tail_1TD = last_1TD
            token, q_1O = choose(self.model.logits(last_1TD[:, -1]))
            drafts.append(token)
            qs.append(q_1O)
        if count > len(drafts):
            state = clone(self.states[0])
            for position in range(self.positions[0], self.positions[0] + count - 1):
                # its own hidden vector stands for the model's, which would tell the same token
                last_1TD, state = self.run(
                    0, last_1TD[:, -1:], [*text, *drafts], state, position=position
                )
                token, q_1O = choose(self.model.logits(last_1TD[:, -1]))
                drafts.append(token)
                qs.append(q_1O)
        return drafts, torch.cat(qs)

    def run(
        self,
        j: int,
        hidden_1TD: Tensor,
        known: list[int],
        state: State,
        position: int | None = None,
    ) -> tuple[Tensor, State]:
        """Module j over hidden vectors from a position on, its next one if None; known: tokens."""
        first, tokens = self.positions[j] if position is None else position, hidden_1TD.shape[1]
        device = hidden_1TD.device
        ctx = SequenceContext.dense(1, tokens, device=device, prefix_tokens=first)
        ahead = known[first + j + 1 : first + j + 1 + tokens]
        tokens_1T = torch.tensor([ahead], device=device)
        hidden_1TD, state, _ = self.model.look_ahead(
            self.modules[j], hidden_1TD, tokens_1T, ctx, state
        )
        return hidden_1TD, state


def clone(state: State) -> State:
    return {name: x.clone() for name, x in state.items()}


def judge(
    drafts: Sequence[int], q_JO: Tensor, p_JO: Tensor, uniform: Callable[[], float]
) -> tuple[int, int]:
    """(how many drafts are kept, the token after them). q_JO: what the J drafts were drawn from;
    p_JO: the model's, one row more."""
    count = len(drafts)
    index_J1 = torch.tensor(drafts, dtype=torch.int64, device=p_JO.device)[:, None]
    q_J, p_J = (x_JO[:count].gather(1, index_J1)[:, 0].tolist() for x_JO in (q_JO, p_JO))
    for j in range(count):
        if uniform() * q_J[j] >= p_J[j]:
            rest_O = (p_JO[j] - q_JO[j]).clamp(min=0)
            return j, draw(rest_O, uniform())
    return count, draw(p_JO[count], uniform())


def draw(p_O: Tensor, uniform: float) -> int:
    """A token by inverting the cumulative distribution of p, which need not be normalised."""
    cumulative_O = p_O.cumsum(dim=-1)
    rank = (cumulative_O <= uniform * cumulative_O[-1]).sum()
    return int(rank.minimum(p_O.nonzero()[-1, 0]))
