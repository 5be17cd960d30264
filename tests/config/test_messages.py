"""Every mistake in a configuration gets one message: place, got, expected, how to fix."""

from __future__ import annotations

import pytest

from llmtrain.config import compose

# command, overrides, what the message must hold
CASES = {
    "unknown option": (
        "train",
        ["mixer=atention"],
        ["mixer=atention: no such option", "attention", "sliding_window", "mean 'attention'?"],
    ),
    "option that is no name": ("train", ["norm=[rmsnorm]"], ["no such option", "layernorm"]),
    "unknown group": (
        "train",
        ["mixr=attention"],
        ["mixr=attention", "no key 'mixr'", "Did you mean 'mixer'?"],
    ),
    "unknown group with package": (
        "train",
        ["+mixr@mixers.b=attention"],
        ["no group 'mixr'", "Did you mean 'mixer'?"],
    ),
    "misspelt key": (
        "train",
        ["train.seqlen=8"],
        ["train has no key 'seqlen'", "micro_batch", "Did you mean 'seq_len'?"],
    ),
    "misspelt knob": (
        "train",
        ["optimizer.weigth_decay=0"],
        ["optimizer has no key 'weigth_decay'", "Did you mean 'weight_decay'?"],
    ),
    "key inside a value": ("train", ["seed.x=1"], ["seed is a value (0)", "no keys"]),
    "added key": ("train", ["+train.foo=1"], ["no key 'foo'", "seq_len"]),
    "added key that exists": ("train", ["+train.seq_len=8"], ["write train.seq_len=8 without +"]),
    "removed key": ("train", ["~train.seq_len"], ["cannot be removed", "set it"]),
    "removed group": ("train", ["~mixer"], ["a group cannot be removed"]),
    "group added twice": ("train", ["+norm=layernorm"], ["already chosen", "norm=layernorm"]),
    "no assignment": ("train", ["train"], ["cannot be read, expected key=value", "quote"]),
    "sweep": ("train", ["seed=1,2"], ["got several values", "key=[a,b]"]),
    "mounted at no letter": (
        "train",
        ["+mixer@second=mha"],
        ["got package 'second'", "+mixer@mixers.b=<option>"],
    ),
    "mounted without plus": ("train", ["mixer@mixers.b=mha"], ["not mounted yet", "leading +"]),
    "wrong type": (
        "train",
        ["train.seq_len=long"],
        ["train.seq_len: got 'long' (str), expected a whole number"],
    ),
    "wrong type of a knob": (
        "train",
        ["optimizer.lr=fast"],
        ["optimizer.lr: got 'fast' (str), expected a number"],
    ),
    "fraction for a whole number": ("train", ["train.keep=1.5"], ["train.keep: got 1.5 (float)"]),
    "null": ("train", ["train.seq_len=null"], ["train.seq_len: got null", "a whole number"]),
    "number for a text": ("train", ["name=7"], ["name: got 7 (int)", "write 'name=\"7\"'"]),
    "no choice": (
        "train",
        ["train.precision=fp16"],
        ["train.precision: got 'fp16'", "one of fp32, bf16"],
    ),
    "not positive": ("train", ["train.keep=0"], ["train.keep: got 0, expected more than 0"]),
    "layers not positive": ("train", ["model.n_layers=0"], ["model.n_layers: got 0", "more than"]),
    "batch not divisible by rows": (
        "train",
        ["train.seq_len=1000", "train.global_batch_tokens=65536"],
        ["train.global_batch_tokens: got 65536", "multiple of train.seq_len=1000", "=66000"],
    ),
    "batch not divisible by micro-batch": (
        "train",
        ["train.seq_len=1024", "train.global_batch_tokens=8192", "train.micro_batch=3"],
        ["train.micro_batch: got 3", "divisor of the 8 rows", "train.micro_batch=null"],
    ),
    "context too long": (
        "train",
        ["train.seq_len=4096", "model.max_seq_len=2048"],
        ["train.seq_len: got 4096", "at most model.max_seq_len=2048"],
    ),
    "width not divisible by heads": (
        "train",
        ["model.d_model=100", "model.n_heads=3", "model.n_kv_heads=1"],
        ["100", "3"],
    ),
    "heads not divisible by groups": (
        "train",
        ["model.n_heads=4", "model.n_kv_heads=3"],
        ["mixer=attention", "3", "4"],
    ),
    "vocabulary too small": (
        "train",
        ["model.vocab_size=100", "tokenizer.vocab_size=4096"],
        ["model.vocab_size: got 100", "at least the tokenizer's 4096", "model.vocab_size=null"],
    ),
    "pattern that does not divide": (
        "train",
        ["model.n_layers=5", "stack.pattern=ab", "+mixer@mixers.b=mha"],
        ["stack.pattern: got 'ab' (2 letters) for model.n_layers=5", "list"],
    ),
    "pattern list of another length": (
        "train",
        ["model.n_layers=4", "stack.pattern=[a,a]"],
        ["stack.pattern: got a list of 2 letters, expected model.n_layers=4"],
    ),
    "letter without mixer": (
        "train",
        ["model.n_layers=4", "stack.pattern=ab"],
        ["letter 'b' names no mixer", "+mixer@mixers.b=<option>"],
    ),
    "mixer without letter": (
        "train",
        ["+mixer@mixers.b=sliding_window"],
        ["mixer@mixers.b=sliding_window: has no effect", "letter 'b'", "stack.pattern"],
    ),
    "channel mounted at no letter": (
        "train",
        ["+channel@mixers.b=gelu"],
        ["got package 'mixers.b'", "+channel@channels.b=<option>", "stack.channel_pattern"],
    ),
    "group that is not mounted": (
        "train",
        ["+norm@channels.b=layernorm"],
        ["got package 'channels.b'", "a further mixer or channel"],
    ),
    "channel letter without channel": (
        "train",
        ["model.n_layers=4", "stack.channel_pattern=ab"],
        ["stack.channel_pattern: letter 'b' names no channel", "+channel@channels.b=<option>"],
    ),
    "channel without letter": (
        "train",
        ["+channel@channels.b=gelu"],
        ["channel@channels.b=gelu: has no effect", "letter 'b'", "stack.channel_pattern"],
    ),
    "channel pattern that does not divide": (
        "train",
        ["model.n_layers=5", "stack.channel_pattern=ab", "+channel@channels.b=gelu"],
        ["stack.channel_pattern: got 'ab' (2 letters) for model.n_layers=5", "list"],
    ),
    "mounted by the stack already": (
        "train",
        ["stack=hybrid", "+mixer@mixers.b=mha"],
        ["mixers.b is already mounted (mixer@mixers.b=attention)", "without +"],
    ),
    "mixer of a stack that is not chosen": (
        "train",
        ["mixer@mixers.b=mha", "stack=decoder"],
        ["not mounted yet", "leading +"],
    ),
    "shared letter that stands once": (
        "train",
        ["stack=hybrid", "stack.shared=b"],
        ["stack.shared: letter 'b' stands 1 times", "at least 2 layers"],
    ),
    "shared letter without layer": (
        "train",
        ["stack.shared=c"],
        ["stack.shared: letter 'c' stands 0 times"],
    ),
    "shared layers with different channels": (
        "train",
        ["stack.shared=a", "stack.channel_pattern=ab", "+channel@channels.b=gelu"],
        ["stack.shared: the layers of letter 'a' have the channels a, b", "channel_pattern"],
    ),
    "shared block as the last layer": (
        "train",
        ["stack=shared_attention", "stack.pattern=aaab"],
        ["stack=shared_attention: shared block", "change stack.pattern"],
    ),
    "shared attention without attention": (
        "train",
        ["stack=shared_attention", "mixers.b.d_input=64"],
        ["mixer@mixers.b=attention", "2 * model.d_model = 256", "d_input left at null"],
    ),
    "no iterations": ("train", ["stack=recurrent_depth", "stack.repeats=0"], ["repeats: got 0"]),
    "depth of a stack that repeats nothing": (
        "train",
        ["stack.repeats=2"],
        ["stack has no key 'repeats'"],
    ),
    "one graph for sampled depths": (
        "train",
        ["stack=recurrent_depth", "train.compile=model"],
        ["train.compile: got model with stack.sampling=lognormal_poisson", "compile=blocks"],
    ),
    "iterations of an evaluation": (
        "eval",
        ["checkpoint=runs/x", "repeats=0"],
        ["repeats: got 0, expected more than 0"],
    ),
    "iterations of a generation": (
        "generate",
        ["checkpoint=runs/x", "repeats=-1"],
        ["repeats: got -1, expected more than 0"],
    ),
    "early exit of tokens checked together": (
        "generate",
        ["checkpoint=runs/x", "exit_threshold=0.1", "speculate=2"],
        ["exit_threshold: got 0.1 with speculate=2", "remove either"],
    ),
    "model size that nothing reads": (
        "train",
        ["position=sinusoidal", "model.rope_theta=5000"],
        ["model.rope_theta=5000: has no effect", "d_model"],
    ),
    "heads of a mixer that has its own number": (
        "train",
        ["mixer=mqa", "model.n_kv_heads=1"],
        ["model.n_kv_heads=1: has no effect"],
    ),
    "weights of one source": (
        "train",
        ["data.weights={stdlib: 1.0}"],
        ["data.weights: has no effect", "'stdlib'", "data.weights=null"],
    ),
    "weights of other sources": (
        "prep",
        [
            "+data.sources.more={_target_: llmtrain_data.sources.StandardLibrary, _partial_: true}",
            "data.weights={stdlib: 1.0, mor: 2.0}",
        ],
        ["data.weights: got weights of mor, stdlib", "more, stdlib"],
    ),
    "target outside the allow-list": (
        "train",
        ["mixer._target_=os.system"],
        ["mixer=attention: _target_ is 'os.system'", "llmtrain."],
    ),
    "target that does not exist": (
        "train",
        ["mixer._target_=llmtrain.mixers.attention.Atention"],
        ["mixer=attention", "does not exist", "YAML"],
    ),
    "interpolation of nothing": (
        "train",
        ["mixer.n_heads=${model.heads}"],
        ["mixer.n_heads", "model.heads"],
    ),
    "prep with a training knob": (
        "prep",
        ["train.seq_len=8"],
        ["train.seq_len=8: has no effect on `llmtrain prep`", "data"],
    ),
    "no checkpoint": ("eval", [], ["checkpoint: no value", "add checkpoint=..."]),
    "group of a checkpoint's part": (
        "eval",
        ["checkpoint=runs/x", "mixer=mha"],
        ["mixer=mha: `llmtrain eval` takes no groups", "checkpoint"],
    ),
    "passkey without the task": (
        "eval",
        ["checkpoint=runs/x", "tasks=[bits_per_byte]", "passkey.samples=2"],
        ["passkey.samples=2: has no effect", "tasks=[bits_per_byte]"],
    ),
    "lm-eval's knob without its tasks": (
        "eval",
        ["checkpoint=runs/x", "tasks=[bits_per_byte,passkey]", "num_fewshot=2"],
        ["num_fewshot=2: has no effect", "a task of lm-eval"],
    ),
    "evaluation of nothing": (
        "eval",
        ["checkpoint=runs/x", "next_line.items=0"],
        ["next_line.items: got 0, expected more than 0"],
    ),
    "no tasks": ("eval", ["checkpoint=runs/x", "tasks=[]"], ["tasks: got an empty list"]),
    "greedy with top_k": (
        "generate",
        ["checkpoint=runs/x", "temperature=0", "top_k=5"],
        ["top_k=5: has no effect with temperature=0", "temperature=0.8"],
    ),
    "negative temperature": (
        "generate",
        ["checkpoint=runs/x", "temperature=-1"],
        ["temperature: got -1", "0 (greedy) or more"],
    ),
    "two rates": (
        "plan",
        ["plan.tokens_per_second=1000", "plan.device_name=NVIDIA H100 80GB HBM3"],
        ["plan.device_name", "no effect", "plan.tokens_per_second=1000"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_message(case):
    command, overrides, fragments = CASES[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the fragments are the match
        compose(command, overrides)
    message = str(caught.value)
    assert all(fragment in message for fragment in fragments), message
    assert "\n" not in message


def test_unknown_key_in_an_experiment(tmp_path):
    """A file of the user's own may misspell too: the composed sections have no unknown keys."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrain: {seqlen: 8}\n")
    with pytest.raises(ValueError, match="seqlen"):
        compose("train", ["experiment=mine"], config_dirs=[tmp_path])


def test_the_causal_objective_needs_causal_mixers(monkeypatch):
    from llmtrain.mixers.attention import Attention

    assert compose("train", [])
    monkeypatch.setattr(Attention, "causal", False)
    with pytest.raises(ValueError, match=r"mixer=attention: a token sees those after it"):
        compose("train", [])
    hybrid = ["+mixer@mixers.b=mamba2", "stack.pattern=bbba"]
    with pytest.raises(ValueError, match=r"mixer=attention: a token sees .*objective=causal"):
        compose("train", hybrid)


def test_one_graph_of_a_fixed_depth():
    fixed = ["stack=recurrent_depth", "stack.sampling=fixed"]
    assert compose("train", [*fixed, "train.compile=model"])


def test_rotary_positions_need_a_mixer_that_reads_them(monkeypatch):
    from llmtrain.mixers.attention import Attention

    monkeypatch.setattr(Attention, "uses_positions", False)
    with pytest.raises(ValueError, match=r"position=rope: has no effect.*position=none"):
        compose("train", ["position=rope"])
