import random
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
import torch

from llmtrain import speculative
from llmtrain.context import SequenceContext
from llmtrain.generate import distribution, generate
from llmtrain.speculative import Drafter, draw, judge, speculate

CONFIGS = Path(__file__).parents[1] / "configs"
MIXERS = sorted(path.stem for path in CONFIGS.glob("mixer/*.yaml"))
SMALL = (
    "model.d_model=24",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.head_dim=6",
    "model.ffn_hidden=40",
    "model.init_std=0.3",
    "model.max_seq_len=64",
)
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 7, 7, 1, 0, 2, 4], [5], [3, 1, 4]]


@pytest.fixture
def make(build_model):
    """make(depth, *changes, **options): a float64 model with that many modules."""

    def build(depth, *changes, **options):
        options = {"objective": "multi_token", **options}
        return build_model(*SMALL, f"objective.depth={depth}", *changes, **options)

    return build


class Oracle(Drafter):
    """Drafts that are often right: the greedy text, each token spoilt with probability 0.2."""

    texts: tuple[list[int], ...]

    def draft(self, text, count, choose):
        whole = next(t for t in self.texts if t[: len(text)] == text)
        spoil = random.Random(len(text))
        drafts = [
            (token + (spoil.random() < 0.2)) % self.model.vocab_size
            for token in whole[len(text) : len(text) + count]
        ]
        q_JO = torch.zeros(count, self.model.vocab_size, dtype=torch.float64)
        return drafts, q_JO.scatter(1, torch.tensor(drafts).reshape(-1, 1), 1.0)


def check_against_greedy(model, drafts, monkeypatch, tokens=40):
    """Greedy texts with the model's own drafts, and with drafts that are often right."""
    expected = generate(model, PROMPTS, max_new_tokens=tokens)
    got, gain = speculate(model, PROMPTS, drafts=drafts, max_new_tokens=tokens)
    assert got == expected
    assert gain.tokens == len(PROMPTS) * tokens
    texts = tuple(prompt + made for prompt, made in zip(PROMPTS, expected))
    monkeypatch.setattr(Oracle, "texts", texts, raising=False)
    monkeypatch.setattr(speculative, "Drafter", Oracle)
    got, gain = speculate(model, PROMPTS, drafts=drafts, max_new_tokens=tokens)
    assert got == expected
    assert 0.5 < gain.acceptance < 0.9
    assert gain.tokens_per_forward > 1.3


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_text_with_every_mixer(build_model, monkeypatch, mixer):
    """At the sizes of model=tiny, where every mixer's defaults fit."""
    window = ["mixer.window=5"] if mixer == "sliding_window" else []
    model = build_model(
        "model.n_layers=2",
        "model.init_std=0.15",
        "objective.depth=2",
        *window,
        mixer=mixer,
        objective="multi_token",
    )
    check_against_greedy(model, 2, monkeypatch)


MAMBA = ("mixer.head_dim=12", "mixer.d_state=8", "mixer.chunk=4")
CASES = {
    "hybrid": (("mixers.b.window=4", "stack.pattern=ab"), {"mixers": {"b": "sliding_window"}}),
    "learned": ((), {"position": "learned"}),
    "post": (("stack.norm_position=post",), {"norm": "layernorm"}),
    "moe": ((), {"channel": "moe"}),
    "recurrent_depth": (("model.n_layers=3", "stack.repeats=3"), {"stack": "recurrent_depth"}),
    "recurrent_depth_of_mamba2": (
        (*MAMBA, "model.n_layers=4", "stack.pattern=abab", "stack.repeats=3"),
        {"mixer": "mamba2", "mixers": {"b": "sliding_window"}, "stack": "recurrent_depth"},
    ),
    "shared_layers": (
        (*MAMBA, "model.n_layers=4", "stack.pattern=ab", "stack.shared=b"),
        {"mixer": "mamba2", "mixers": {"b": "attention"}},
    ),
    "shared_attention": (
        (*MAMBA, "model.n_layers=4"),
        {"mixer": "mamba2", "mixers": {"b": "attention"}, "stack": "shared_attention"},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("depth", "drafts"), [(3, 3), (1, 4)])
def test_greedy_text(make, monkeypatch, case, depth, drafts):
    changes, options = CASES[case]
    check_against_greedy(make(depth, *changes, **options), drafts, monkeypatch)


@pytest.mark.parametrize("limit", [0, 2, 1000])
def test_greedy_text_whenever_tokens_are_read_again(make, monkeypatch, limit):
    monkeypatch.setattr(speculative, "MAX_UNREAD", limit)
    check_against_greedy(make(3, mixer="sliding_window"), 3, monkeypatch)


@pytest.mark.parametrize("repeats", [1, 6])
def test_greedy_text_at_another_depth(make, monkeypatch, repeats):
    """Iterations that the model was not made with."""
    model = make(2, "model.n_layers=3", "stack.repeats=3", stack="recurrent_depth")
    before = generate(model, PROMPTS, max_new_tokens=10)
    model.stack.set_depth(repeats=repeats)
    assert generate(model, PROMPTS, max_new_tokens=10) != before
    check_against_greedy(model, 2, monkeypatch)


def test_forward_passes(make, monkeypatch):
    """Right drafts: one pass for all of them and one token more; wrong ones: a token a pass."""
    model = make(3)
    (expected,) = generate(model, [[5]], max_new_tokens=41)
    monkeypatch.setattr(Oracle, "texts", ([5, *expected],), raising=False)
    monkeypatch.setattr(speculative, "Drafter", Oracle)
    monkeypatch.setattr(random.Random, "random", lambda self: 0.9)
    _, gain = speculate(model, [[5]], drafts=3, max_new_tokens=41)
    assert (gain.tokens, gain.forwards, gain.drafted, gain.accepted) == (41, 11, 30, 30)
    assert gain.describe() == (
        "speculation: 30 of 30 drafted tokens accepted (100.0%), 3.73 tokens a forward pass"
    )
    monkeypatch.setattr(random.Random, "random", lambda self: 0.1)
    monkeypatch.setattr(speculative, "MAX_UNREAD", 1000)
    _, gain = speculate(model, [[5]], drafts=3, max_new_tokens=41)
    # the last rounds draft no more than could be used
    assert (gain.tokens, gain.forwards, gain.drafted, gain.accepted) == (41, 41, 114, 0)


def drafts_by_definition(model, text, drafts):
    """q_JO of drafts after the text: everything read anew, no state."""
    known, read = [*text, *drafts], len(text) - 1
    hidden_1TD = model(torch.tensor([text[:-1]]), SequenceContext.dense(1, read)).hidden_BTD
    logits = []
    for j in range(len(drafts)):
        chained = len(model.mtp) == 1
        module, offset = (model.mtp[0], 1) if chained else (model.mtp[j], j + 1)
        count = hidden_1TD.shape[1]
        tokens_1T = torch.tensor([known[offset : offset + count]])
        ctx = SequenceContext.dense(1, count)
        out_1TD, _, _ = model.look_ahead(module, hidden_1TD, tokens_1T, ctx)
        logits.append(model.logits(out_1TD[0, -1]))
        hidden_1TD = torch.cat([hidden_1TD, out_1TD[:, -1:]], dim=1) if chained else out_1TD
    return torch.stack(logits).double().softmax(-1)


@pytest.mark.parametrize(("depth", "drafts"), [(1, 1), (2, 2), (3, 3), (3, 2), (1, 4)])
@pytest.mark.parametrize("mixer", ["attention", "sliding_window", "mamba2"])
def test_drafts_are_the_modules_predictions(build_model, monkeypatch, mixer, depth, drafts):
    changes = {
        "attention": (),
        "sliding_window": ("mixer.window=3",),
        "mamba2": MAMBA,
    }[mixer]
    model = build_model(
        *SMALL,
        *changes,
        f"objective.depth={depth}",
        mixer=mixer,
        objective="multi_token",
        vocab_size=7,
    )
    seen, draft = [], Drafter.draft

    def recorded(self, text, count, choose):
        got, q_JO = draft(self, text, count, choose)
        if got:
            seen.append(len(got))
            expected = drafts_by_definition(model, text, got)
            torch.testing.assert_close(q_JO, expected, atol=1e-11, rtol=1e-9)
        return got, q_JO

    monkeypatch.setattr(Drafter, "draft", recorded)
    prompts = [[5], [5, 1], [3, 6, 0, 2, 1, 1]]
    _, gain = speculate(model, prompts, drafts=drafts, max_new_tokens=30, temperature=1.0)
    assert max(seen) == drafts
    assert gain.accepted > 10  # so that both happen
    assert gain.accepted < gain.drafted


def chi_square(counts, expected):
    return sum((counts[key] - n) ** 2 / n for key, n in expected.items())


@pytest.mark.parametrize(
    ("depth", "drafts", "knobs"),
    [(2, 2, {}), (1, 3, {"temperature": 0.7}), (1, 1, {"top_p": 0.8, "top_k": 3})],
)
def test_samples_follow_the_model(build_model, depth, drafts, knobs):
    """1200 texts of three tokens out of a vocabulary of four: frequencies against the model's own
    probabilities, by a chi-square test at the level of 0.1 %."""
    model = build_model(
        *SMALL, f"objective.depth={depth}", objective="multi_token", vocab_size=4
    ).eval()
    knobs = {"temperature": 1.0, "top_k": None, "top_p": None, **knobs}
    prompt, count = [1, 2], 1200
    texts = list(product(range(4), repeat=3))
    tokens_BT = torch.tensor([prompt + list(text) for text in texts])
    with torch.no_grad():
        hidden_BTD = model(tokens_BT, SequenceContext.dense(len(texts), 5)).hidden_BTD
        p_NO = distribution(model.logits(hidden_BTD[:, 1:4]).flatten(0, 1), **knobs)
    p_B3 = p_NO.gather(1, tokens_BT[:, 2:].reshape(-1, 1)).reshape(-1, 3)
    p_B = p_B3.prod(dim=1)
    assert p_B.sum().item() == pytest.approx(1.0)

    made, gain = speculate(
        model, [prompt] * count, drafts=drafts, max_new_tokens=3, seed=3, **knobs
    )
    assert 0.2 < gain.acceptance < 0.95
    counts = Counter(map(tuple, made))
    expected = {text: count * p.item() for text, p in zip(texts, p_B)}
    assert all(expected[text] > 0 for text in counts)
    # texts that are expected fewer than five times count as one
    rare = [text for text in texts if expected[text] < 5]
    if sum(expected[text] for text in rare) > 0:
        expected["rare"] = sum(expected.pop(text) for text in rare)
        counts["rare"] = sum(counts[text] for text in rare)
    else:
        for text in rare:
            del expected[text]
    freedom = len(expected) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert freedom >= 10
    assert chi_square(counts, expected) < limit


def test_judge_keeps_as_many_as_can_be(monkeypatch):
    """40,000 pairs of drafts: the tokens' frequencies, and acceptance = sum of min(p, q)."""
    generator = torch.Generator().manual_seed(0)
    p_3O = torch.rand(3, 5, generator=generator, dtype=torch.float64).softmax(-1)
    q_2O = (4 * torch.rand(2, 5, generator=generator, dtype=torch.float64)).softmax(-1)
    p_3O[1, 2] = q_2O[0, 4] = 0.0
    p_3O, q_2O = (x / x.sum(-1, keepdim=True) for x in (p_3O, q_2O))
    uniform, count = random.Random(0).random, 40_000
    first, second, accepted = Counter(), Counter(), Counter()
    for _ in range(count):
        drafts = [draw(q_O, uniform()) for q_O in q_2O]
        kept, token = judge(drafts, q_2O, p_3O, uniform)
        made = [*drafts[:kept], token]
        first[made[0]] += 1
        if kept:
            second[made[1]] += 1
        accepted[kept] += 1
    for counts, p_O in ((first, p_3O[0]), (second, p_3O[1])):
        total = counts.total()
        expected = {i: total * p for i, p in enumerate(p_O.tolist()) if p}
        assert set(counts) == set(expected)
        assert chi_square(counts, expected) < 18.5  # 4 degrees of freedom, level of 0.1 %
    shares = torch.minimum(p_3O[:2], q_2O).sum(-1).tolist()
    assert 1 - accepted[0] / count == pytest.approx(shares[0], abs=0.01)
    assert accepted[2] / (count - accepted[0]) == pytest.approx(shares[1], abs=0.01)


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 1), (0.29, 1), (0.31, 3), (0.999999, 3), (1 - 2**-53, 3)],
)
def test_draw(uniform, token):
    p_O = torch.tensor([0.0, 0.6, 0.0, 1.4, 0.0], dtype=torch.float64)
    assert draw(p_O, uniform) == token


def test_samples_repeat_and_do_not_depend_on_the_other_prompts(make):
    model = make(2)
    knobs = {"drafts": 2, "max_new_tokens": 10, "temperature": 1.5, "top_k": 20, "seed": 7}
    together, _ = speculate(model, PROMPTS, **knobs)
    assert together == speculate(model, PROMPTS, **knobs)[0]
    alone = [speculate(model, [prompt], **knobs)[0][0] for prompt in PROMPTS[:4]]
    assert alone == together[:4]
    assert together[0] != together[4]
    assert speculate(model, PROMPTS, **{**knobs, "seed": 8})[0] != together


def test_stop_tokens_end_a_row(make, monkeypatch):
    model = make(3)
    free = generate(model, PROMPTS, max_new_tokens=12)
    monkeypatch.setattr(
        Oracle, "texts", tuple(p + made for p, made in zip(PROMPTS, free)), raising=False
    )
    monkeypatch.setattr(speculative, "Drafter", Oracle)
    stops = {free[0][4], free[3][2]}
    expected = generate(model, PROMPTS, max_new_tokens=12, stop_tokens=stops)
    got, gain = speculate(model, PROMPTS, drafts=3, max_new_tokens=12, stop_tokens=stops)
    assert got == expected
    assert gain.tokens == sum(map(len, expected)) < 60


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
def test_few_tokens(make, tokens):
    model = make(2)
    got, gain = speculate(model, PROMPTS, drafts=2, max_new_tokens=tokens)
    assert got == generate(model, PROMPTS, max_new_tokens=tokens)
    assert gain.tokens == 5 * tokens
    assert gain.drafted == 5 * max(0, tokens - 2) + (tokens > 3)


def test_as_many_tokens_as_learned_positions(make):
    model = make(1, position="learned")
    prompts = [[1] * 40]
    got, _ = speculate(model, prompts, drafts=3, max_new_tokens=24)
    assert got == generate(model, prompts, max_new_tokens=24)
    with pytest.raises(ValueError, match=r"prompt 0 and its continuation have 65 tokens"):
        speculate(model, prompts, drafts=3, max_new_tokens=25)


def test_errors(make, build_model):
    with pytest.raises(ValueError, match=r"speculate: got 1 for a model without modules of multi"):
        speculate(build_model(*SMALL), PROMPTS, drafts=1, max_new_tokens=2)
    message = r"speculate: got 3 for a model of 2 modules, expected 1 to 2 \(more only where"
    with pytest.raises(ValueError, match=message):
        speculate(make(2), PROMPTS, drafts=3, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"speculate: got 0 for a model of 1 modules"):
        speculate(make(1), PROMPTS, drafts=0, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"generate: prompt 0 is empty"):
        speculate(make(1), [[]], drafts=1, max_new_tokens=2)
