import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.generate import generate, sample

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
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6], [5], [3, 1, 4], [3, 5, 8, 9, 7]]


@pytest.fixture
def model(build_model):
    return build_model(*SMALL)


def full_forward(model, prompt, count):
    """The definition: the whole text is read again for every token."""
    text = list(prompt)
    for _ in range(count):
        tokens = torch.tensor([text])
        logits = model.logits(model(tokens, SequenceContext.dense(1, len(text))).hidden_BTD)
        text.append(logits[0, -1].argmax().item())
    return text[len(prompt) :]


@pytest.mark.parametrize("batch", [1, 2, 32])
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ((), {}),
        (("mixers.b.window=4", "stack.pattern=ab"), {"mixers": {"b": "sliding_window"}}),
        (("stack.coda=0",), {"position": "learned", "stack": "recurrent_depth"}),
    ],
    ids=["gqa", "hybrid", "recurrent_depth"],
)
def test_greedy_equals_the_full_forward(build_model, changes, options, batch):
    model = build_model(*SMALL, *changes, **options)
    got = generate(model, PROMPTS, max_new_tokens=12, batch=batch)
    assert got == [full_forward(model, prompt, 12) for prompt in PROMPTS]


def test_greedy_with_a_recurrent_mixer(make_model):
    model = make_model()
    got = generate(model, PROMPTS, max_new_tokens=8)
    assert got == [full_forward(model, prompt, 8) for prompt in PROMPTS]


def test_stop_tokens_end_a_row_and_leave_the_others(model):
    free = generate(model, PROMPTS, max_new_tokens=12)
    stops = {free[0][4], free[3][2]}
    stopped = generate(model, PROMPTS, max_new_tokens=12, stop_tokens=stops)
    for short, long in zip(stopped, free, strict=True):
        ends = [i for i, token in enumerate(long) if token in stops]
        assert short == (long[: ends[0] + 1] if ends else long)
    assert any(len(short) < 12 for short in stopped)


def test_samples_repeat_and_do_not_depend_on_the_batch(model):
    knobs = {"max_new_tokens": 10, "temperature": 1.5, "seed": 7}
    together = generate(model, PROMPTS, **knobs)
    assert together == generate(model, PROMPTS, **knobs)
    assert together == generate(model, PROMPTS, batch=2, **knobs)
    assert generate(model, PROMPTS[::-1], **knobs)[::-1][1:4] == together[1:4]
    alone = [generate(model, [prompt], **knobs)[0] for prompt in PROMPTS[:4]]
    assert alone == together[:4]
    # the same prompt twice is two samples; another seed is another sample
    assert together[0] != together[4]
    assert generate(model, PROMPTS, **{**knobs, "seed": 8}) != together


def test_global_random_state_is_untouched(model):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    generate(model, PROMPTS, max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.rand(2), expected)


def frequencies(*, temperature=1.0, top_k=None, top_p=None):
    """Share of tokens of probability 0.3, 0.05, 0.5, 0.15 among 20,000 evenly spread uniforms."""
    count = 20_000
    logits_BO = torch.tensor([0.3, 0.05, 0.5, 0.15]).log().expand(count, 4)
    uniform_B = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens_B = sample(logits_BO, uniform_B, temperature, top_k, top_p)
    return tokens_B.bincount(minlength=4) / count


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [0.3, 0.05, 0.5, 0.15]),
        ({"temperature": 0.5}, [0.09 / 0.365, 0.0025 / 0.365, 0.25 / 0.365, 0.0225 / 0.365]),
        ({"top_k": 2}, [0.375, 0, 0.625, 0]),
        ({"top_k": 9}, [0.3, 0.05, 0.5, 0.15]),
        ({"top_p": 0.79}, [0.375, 0, 0.625, 0]),
        ({"top_p": 0.81}, [0.3 / 0.95, 0, 0.5 / 0.95, 0.15 / 0.95]),
        ({"top_p": 1.0}, [0.3, 0.05, 0.5, 0.15]),
        ({"top_p": 0.01}, [0, 0, 1, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.375, 0, 0.625, 0]),
    ],
)
def test_distribution(knobs, expected):
    assert frequencies(**knobs).tolist() == pytest.approx(expected, abs=2e-4)


def test_uniform_at_the_edge_of_the_last_token():
    logits_BO = torch.full((2, 1000), 3.0)
    edge_B = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for top_p in (None, 0.5):
        tokens_B = sample(logits_BO, edge_B, 1.0, None, top_p)
        assert ((tokens_B >= 0) & (tokens_B < 1000)).all()


def test_no_new_tokens(model):
    assert generate(model, PROMPTS, max_new_tokens=0) == [[]] * 6
    assert generate(model, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "knobs", "message"),
    [
        ([[1], []], {}, r"generate: prompt 1 is empty, expected at least one token; begin it with"),
        ([[1], [2, 50]], {}, r"generate: prompt 1 holds token 50, expected 0 to 49; use the token"),
        ([[1, -3]], {}, r"generate: prompt 0 holds token -3, expected 0 to 49"),
        ([[1]], {"max_new_tokens": -1}, r"generate: got max_new_tokens=-1, expected >= 0; set max"),
        ([[1]], {"temperature": -0.1}, r"generate: got temperature=-0.1, expected >= 0; set temp"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, r"generate: got top_k=0, expected >= 1 or null"),
        ([[1]], {"temperature": 1.0, "top_p": 0.0}, r"generate: got top_p=0.0, expected above 0 a"),
        ([[1]], {"batch": 0}, r"generate: got batch=0, expected >= 1; set batch"),
        ([[1]], {"top_k": 5}, r"top_k=5, top_p=None with temperature=0, where they have no effect"),
    ],
)
def test_errors(model, prompts, knobs, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **{"max_new_tokens": 2, **knobs})


def test_more_tokens_than_learned_positions(build_model):
    model = build_model(*SMALL, position="learned")
    generate(model, [[1] * 60], max_new_tokens=4)
    message = r"prompt 0 and its continuation have 65 tokens, expected at most the 64 positions"
    with pytest.raises(ValueError, match=message):
        generate(model, [[1] * 60], max_new_tokens=5)
