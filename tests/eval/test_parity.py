"""The adapter against lm-eval's own `hf` model around the same weights in transformers' Llama."""

import json

import lm_eval
import pytest
import torch
from llmtrain_eval.harness import evaluate, load_tasks
from lm_eval.models.huggingface import HFLM
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from llmtrain.export.llama import to_llama

CONTEXTS = (
    "the model reads a row",
    "the model reads a row of tokens and predicts every next one",
    "def value: return 12345\n  import self",
    "green, blue; yellow é",
    "a",
    "",
    "tokens and a trailing blank ",
    "the pass key " * 30,  # longer than the context
)
CONTINUATIONS = (" of", " of tokens and predicts", "\n  return 67890 éé", "!", " the")


@pytest.fixture
def their_tokenizer(tokenizer_file, tokenizer):
    """The same tokenizer for transformers; with_bos: putting end-of-text first when asked to."""

    def make(with_bos):
        if with_bos:
            eot = "<|endoftext|>"
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{eot} $A", special_tokens=[(eot, 0)]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
        )

    return make


@pytest.fixture
def both(small_model, make_lm, their_tokenizer):
    """both(batch_size, add_bos): their adapter and ours, with contexts of 64 tokens."""

    def make(batch_size=1, add_bos=False, changes=()):
        model = small_model(*changes)
        theirs = HFLM(
            pretrained=to_llama(model),
            tokenizer=their_tokenizer(add_bos),
            batch_size=batch_size,
            max_length=64,
            add_bos_token=add_bos or None,
            softmax_dtype="float32",
        )
        ours = make_lm(model, add_bos=add_bos, batch_tokens=batch_size * 64)
        return theirs, ours

    return make


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("add_bos", [False, True])
def test_loglikelihood(both, ask, batch_size, add_bos):
    theirs, ours = both(batch_size, add_bos)
    pairs = [(context, more) for context in CONTEXTS for more in CONTINUATIONS]
    expected = theirs.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    got = ours.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    torch.testing.assert_close(
        torch.tensor([score for score, _ in got]),
        torch.tensor([score for score, _ in expected]),
        atol=1e-4,
        rtol=0,
    )
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


def test_greedy_flags_of_greedy_texts(both, ask):
    """Random continuations are hardly ever greedy; the model's own are."""
    theirs, ours = both()
    kwargs = {"until": [], "max_gen_toks": 6}
    contexts = [context for context in CONTEXTS if context]
    texts = ours.generate_until(ask("generate_until", [(c, kwargs) for c in contexts]), True)
    pairs = list(zip(contexts, texts))
    expected = theirs.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    got = ours.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    assert [flag for _, flag in got] == [flag for _, flag in expected]
    assert any(flag for _, flag in got)


def test_rolling(both, ask):
    theirs, ours = both(batch_size=3)
    texts = [(text,) for text in (*CONTEXTS[:5], "green blue yellow, " * 60)]
    expected = theirs.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
    got = ours.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
    assert got == pytest.approx(expected, abs=1e-3)
    with_bos = both(batch_size=3, add_bos=True)[1]
    again = with_bos.loglikelihood_rolling(ask("loglikelihood_rolling", texts), disable_tqdm=True)
    assert again == got  # end-of-text is their prefix in either case


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("until", [["\n"], [" the", "é"], ["tokens and"], []])
def test_generate_until(both, ask, batch_size, add_bos, until):
    theirs, ours = both(batch_size, add_bos)
    kwargs = {"until": until, "max_gen_toks": 20, "do_sample": False}
    arguments = [(context, kwargs) for context in CONTEXTS if context]
    expected = theirs.generate_until(ask("generate_until", arguments), disable_tqdm=True)
    got = ours.generate_until(ask("generate_until", arguments), disable_tqdm=True)
    assert got == expected
    assert any(expected)


def test_a_whole_task(both, tmp_path):
    """Multiple choice with few-shot examples, from a file, through lm-eval's evaluator."""
    items = [
        {
            "query": f"the value {i} green",
            "choices": ["blue", "a line", "text é", "67890"],
            "gold": i % 4,
        }
        for i in range(12)
    ]
    data = tmp_path / "items.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "colours.yaml").write_text(
        f"""
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / "cache"}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
num_fewshot: 2
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""
    )
    theirs, ours = both(batch_size=4, add_bos=True)
    loaded = load_tasks(["colours"], metadata={}, include_path=str(tmp_path))
    expected = lm_eval.evaluate(theirs, loaded)
    scores, samples = evaluate(
        ours, load_tasks(["colours"], metadata={}, include_path=str(tmp_path))
    )
    assert scores["colours"]["samples"] == 12
    for metric in ("acc", "acc_norm", "brier_score"):
        assert scores["colours"][metric] == pytest.approx(
            expected["results"]["colours"][f"{metric},none"], abs=1e-5
        )
    for mine, other in zip(samples["colours"], expected["samples"]["colours"], strict=True):
        assert mine["arguments"] == other["arguments"]
        for (got, got_greedy), (want, want_greedy) in zip(
            mine["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert got == pytest.approx(want, abs=1e-4)
            assert got_greedy == want_greedy
