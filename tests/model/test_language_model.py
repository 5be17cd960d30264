import pytest
import torch

from llmtrain.context import SequenceContext
from llmtrain.model.language_model import LanguageModel, ModelState
from llmtrain.model.norm import RMSNorm
from llmtrain.model.recurrent_depth import RecurrentDepth

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])


def recurrent(blocks):
    return RecurrentDepth(blocks, d_model=16, norm=lambda: RMSNorm(16), repeats=3)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize(
    "knobs",
    [{}, {"norm_position": "post"}, {"stack": recurrent}, {"tied": False}],
    ids=["pre", "post", "recurrent", "untied"],
)
def test_step_by_step_equals_forward_at_different_lengths(make_model, knobs):
    model = make_model(**knobs)
    whole = model.logits(model(TOKENS, SequenceContext.dense(2, 6)).hidden_BTD)
    # row 0 has read 2 tokens, row 1 has read 3; both then advance in one batch
    states = []
    for row, length in enumerate((2, 3)):
        ctx = SequenceContext.dense(1, length)
        out = model(TOKENS[row : row + 1, :length], ctx, model.init_state(1, 6))
        close(model.logits(out.hidden_BTD)[0], whole[row, :length])
        states.append(out.state)
    state = ModelState.cat(states)
    assert state.length_B.tolist() == [2, 3]
    for t in range(3):
        logits, state = model.step(torch.stack([TOKENS[0, 2 + t], TOKENS[1, 3 + t]]), state)
        close(logits[0], whole[0, 2 + t])
        close(logits[1], whole[1, 3 + t])
    # one row goes on alone, in another order
    state = state.select(torch.tensor([1, 0])).select(torch.tensor([1]))
    assert state.length_B.tolist() == [5]
    logits, state = model.step(TOKENS[0, 5:], state)
    close(logits[0], whole[0, 5])


def test_prefill_in_pieces(make_model):
    model = make_model()
    whole = model(TOKENS, SequenceContext.dense(2, 6)).hidden_BTD
    state = model.init_state(2, 6)
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        ctx = SequenceContext.dense(2, stop - start, prefix_tokens=start)
        hidden, state, _ = model(TOKENS[:, start:stop], ctx, state)
        close(hidden, whole[:, start:stop])
    assert state.length_B.tolist() == [6, 6]


def test_packed_rows_equal_separate_documents(make_model):
    model = make_model(stack=recurrent)
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[0, 2] = starts[1, 1] = starts[1, 4] = True
    packed = model(TOKENS, SequenceContext.packed(starts)).hidden_BTD
    for row, first, last in ((0, 0, 2), (0, 2, 6), (1, 0, 1), (1, 1, 4), (1, 4, 6)):
        alone = model(TOKENS[row : row + 1, first:last], SequenceContext.dense(1, last - first))
        close(packed[row, first:last], alone.hidden_BTD[0])


def test_causal_bitwise(make_model):
    model = make_model()
    changed = TOKENS.clone()
    changed[:, 3] = 0
    ctx = SequenceContext.dense(2, 6)
    a, b = model(TOKENS, ctx).hidden_BTD, model(changed, ctx).hidden_BTD
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.equal(a[:, 3], b[:, 3])


def test_padding_rows_get_no_probability(make_model):
    model = make_model(tied=False)
    with torch.no_grad():
        model.head.weight[19:] = 1e6
    hidden = model(TOKENS, SequenceContext.dense(2, 6)).hidden_BTD
    logits = model.logits(hidden)
    assert logits.shape == (2, 6, 19)
    close(logits, hidden @ model.head.weight[:19].T)
    logits.sum().backward()
    assert (model.head.weight.grad[19:] == 0).all()


def test_post_norm_has_no_second_final_norm(make_model):
    post, pre = make_model(norm_position="post"), make_model()
    assert not any(name.startswith("norm.") for name, _ in post.named_parameters())
    assert any(name.startswith("norm.") for name, _ in pre.named_parameters())
    rms = post(TOKENS, SequenceContext.dense(2, 6)).hidden_BTD.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones_like(rms), atol=1e-2, rtol=0)


def test_compute_dtype_and_float32_gradients(make_model):
    model = make_model(dtype=torch.bfloat16).float()
    assert model.compute_dtype == torch.bfloat16
    hidden, state, _ = model(TOKENS, SequenceContext.dense(2, 6), model.init_state(2, 6))
    assert hidden.dtype == state.layers[0]["s"].dtype == torch.bfloat16
    model.logits(hidden).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    exact = make_model()(TOKENS, SequenceContext.dense(2, 6)).hidden_BTD
    error = (hidden.double() - exact).square().mean() / exact.square().mean()
    assert error.sqrt() < 0.02


def test_no_state_out_without_a_state_in(make_model):
    assert make_model()(TOKENS, SequenceContext.dense(2, 6)).state is None


def test_builds_on_meta(make_model):
    model = make_model().to("meta")
    out = model(TOKENS.to("meta"), SequenceContext.dense(2, 6, device="meta"))
    assert model.logits(out.hidden_BTD).shape == (2, 6, 19)


def test_state_dict_round_trip(make_model):
    first, second = make_model(seed=0), make_model(seed=1)
    second.load_state_dict(first.state_dict())
    ctx = SequenceContext.dense(2, 6)
    assert torch.equal(first(TOKENS, ctx).hidden_BTD, second(TOKENS, ctx).hidden_BTD)


def test_state_with_packed_rows_is_an_error(make_model):
    model = make_model()
    packed = SequenceContext.packed(torch.zeros(2, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"model: got a state together with packed rows, expected"):
        model(TOKENS, packed, model.init_state(2, 6))


def test_vocabulary_must_fit_the_embedding(make_model):
    parts = make_model()
    with pytest.raises(
        ValueError,
        match=r"vocab_size=25 and padded_vocab_size=24, expected the embedding's 24 rows",
    ):
        LanguageModel(
            embedding=parts.embedding,
            position=parts.position,
            stack=parts.stack,
            norm=parts.norm,
            vocab_size=25,
            padded_vocab_size=24,
        )
