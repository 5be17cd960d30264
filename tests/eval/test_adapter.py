"""What the adapter adds to scoring: tokens, truncation, generation options, its refusals."""

import pytest
import torch
from llmtrain_eval import ranks
from lm_eval.utils import get_rolling_token_windows

TEXT = "the model reads a row of tokens"


def test_contexts_begin_with_end_of_text(make_lm):
    lm = make_lm()
    assert lm.tok_encode(TEXT)[0] == lm.eot_token_id == lm.prefix_token_id
    assert lm.tok_encode(TEXT)[1:] == lm.tok_encode(TEXT, add_special_tokens=False)
    assert make_lm(add_bos=False).tok_encode(TEXT) == lm.tok_encode(TEXT)[1:]


def test_equal_tokenizers_have_equal_names(make_lm, tokenizer):
    name = make_lm().tokenizer_name
    assert name == make_lm().tokenizer_name
    tokenizer.add_tokens(["another"])
    assert name != make_lm().tokenizer_name


def test_rolling_windows_are_disjoint(make_lm, ask):
    """Every token is scored once, at most max_length tokens are read."""
    lm = make_lm(max_length=16)
    text = "green blue yellow, " * 30
    tokens = lm.tok_encode(text, add_special_tokens=False)
    windows = list(get_rolling_token_windows(tokens, 0, 16, 1))
    assert [token for _, predicted in windows for token in predicted] == tokens
    pairs = [(None, inputs[: len(inputs) - len(out) + 1], out) for inputs, out in windows]
    parts = [score for score, _ in lm._loglikelihood_tokens(pairs, disable_tqdm=True)]
    (total,) = lm.loglikelihood_rolling(ask("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert total == pytest.approx(sum(parts), abs=1e-6)
    assert total < -len(tokens)


def test_truncation_is_counted_by_task_and_logged(make_lm, ask, caplog):
    lm = make_lm()
    long, short = (" pass key" * 60, " the"), ("pass key", " the")
    scores = lm.loglikelihood(ask("loglikelihood", [long, short, long], task="lines"), True)
    assert lm.truncated == {"lines": 2}
    assert "cut on the left to fit max_length=64 (requests so far): lines: 2" in caplog.text
    # what is left of the context is its end
    tokens = lm.tok_encode(long[0], add_special_tokens=False)
    answer = lm.tok_encode(long[1], add_special_tokens=False)
    kept = tokens[-(64 + 1 - len(answer)) :]
    expected = lm._loglikelihood_tokens([(None, kept, answer)], disable_tqdm=True)
    assert scores[0] == pytest.approx(expected[0], abs=1e-5)

    kwargs = {"until": [], "max_gen_toks": 10}
    texts = lm.generate_until(ask("generate_until", [(long[0], kwargs)], task="texts"), True)
    assert lm.truncated == {"lines": 2, "texts": 1}
    bare = make_lm(add_bos=False)
    kept = lm.tokenizer.decode(tokens[-54:])
    assert bare.generate_until(ask("generate_until", [(kept, kwargs)]), True) == texts


def test_a_task_can_refuse_truncation(make_lm, ask):
    lm = make_lm()
    lm.refuse_truncation.add("lines")
    pairs = [(" pass key" * 60, " the")]
    with pytest.raises(ValueError, match=r"task lines: .*expected at most 64.*raise max_length"):
        lm.loglikelihood(ask("loglikelihood", pairs, task="lines"), True)
    kwargs = {"until": [], "max_gen_toks": 10}
    with pytest.raises(ValueError, match=r"task lines: .*expected at most 54.*raise max_length"):
        lm.generate_until(ask("generate_until", [(pairs[0][0], kwargs)], task="lines"), True)


def sampled(lm, ask, contexts, **kwargs):
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, **kwargs}
    arguments = [(context, kwargs) for context in contexts]
    return lm.generate_until(ask("generate_until", arguments), disable_tqdm=True)


def test_sampling_depends_on_seed_context_and_repetition_only(make_lm, ask):
    texts = sampled(make_lm(), ask, [TEXT, TEXT, "pass key", TEXT])
    assert len(set(texts)) == 4
    assert texts == sampled(make_lm(batch_tokens=1), ask, [TEXT, TEXT, "pass key", TEXT])
    reordered = sampled(make_lm(), ask, ["pass key", TEXT, TEXT, TEXT])
    assert reordered == [texts[2], texts[0], texts[1], texts[3]]
    assert texts != sampled(make_lm(seed=1), ask, [TEXT, TEXT, "pass key", TEXT])


def test_generation_options_reach_the_model(make_lm, ask):
    """One token to choose from is greedy decoding."""
    greedy = sampled(make_lm(), ask, [TEXT], do_sample=False, temperature=0.0)
    assert sampled(make_lm(), ask, [TEXT], top_k=1) == greedy
    assert sampled(make_lm(), ask, [TEXT], top_p=1e-6) == greedy
    assert sampled(make_lm(), ask, [TEXT]) != greedy
    # greedy decoding ignores what only sampling knows, as lm-eval's tasks expect
    assert sampled(make_lm(), ask, [TEXT], do_sample=False, top_p=0.5) == greedy


def test_rows_stop_at_tokens_that_hold_a_stop_string(make_lm, small_model, ask):
    model = small_model()
    lm = make_lm(model)
    pieces = [lm.tokenizer.decode([i]) for i in range(1, model.vocab_size)]
    expected = {0} | {i for i, piece in enumerate(pieces, start=1) if "\n" in piece or ":" in piece}
    assert lm._stop_tokens(("\n", ":")) == expected
    assert len(expected) > 3

    (text,) = lm.generate_until(ask("generate_until", [(TEXT, {"until": []})]), True)
    stop = text[20:21]
    steps = []
    model.step, step = lambda *args: (steps.append(1), step(*args))[1], model.step
    kwargs = {"until": [stop], "max_gen_toks": 40}
    (cut,) = lm.generate_until(ask("generate_until", [(TEXT, kwargs)]), True)
    assert cut == text.split(stop)[0]
    assert len(steps) < 30


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "asks for .*num_beams.*, expected until.*remove the others"),
        ({"repetition_penalty": 1.2}, "asks for .*repetition_penalty.*remove the others"),
        ({"max_gen_toks": 64}, "max_gen_toks is 64, expected 1 to 63.*lower max_gen_toks"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0, expected 1 to 63"),
    ],
)
def test_generation_options_that_cannot_be_followed(make_lm, ask, kwargs, message):
    arguments = [(TEXT, {"until": ["\n"], **kwargs})]
    with pytest.raises(ValueError, match=f"task texts: .*{message}"):
        make_lm().generate_until(ask("generate_until", arguments, task="texts"), True)


def test_models_that_see_later_tokens_are_refused(make_lm, small_model):
    model = small_model()
    type(model.stack.blocks[0].mixer).causal, before = False, True
    try:
        with pytest.raises(ValueError, match="mixers Attention see later tokens, expected causal"):
            make_lm(model)
    finally:
        type(model.stack.blocks[0].mixer).causal = before


def test_a_tokenizer_of_another_model_is_refused(make_lm, build_model):
    model = build_model("model.d_model=32", vocab_size=100, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"tokenizer has .* tokens, expected at most .* 100; use"):
        make_lm(model)


def test_one_process_shares_with_itself():
    assert (ranks.rank(), ranks.world_size()) == (0, 1)
    assert list(ranks.share([1, 2, 3])) == [1, 2, 3]
    assert ranks.gather("part") == ["part"]
    assert ranks.join(torch.device("cpu")) is False


def test_more_ranks_than_gpus(monkeypatch):
    started = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^device=cuda: rank 2 is .* shows 2 GPUs.*at most 2"):
        ranks.device("cuda")
    assert ranks.device("cpu") == torch.device("cpu")
