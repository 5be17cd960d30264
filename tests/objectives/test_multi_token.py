"""Multi-token prediction against eq. 21 to 25 of arXiv:2412.19437, document by document."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llmtrain import build
from llmtrain.accounting import (
    activation_bytes,
    flops_per_token,
    logits_bytes,
    parameters_by_part,
    train_flops_per_token,
)
from llmtrain.config import compose
from llmtrain.context import SequenceContext
from llmtrain.data.batch import MicroBatch
from llmtrain.objectives.causal import Causal
from llmtrain.objectives.multi_token import MultiToken
from llmtrain.train.module import TrainModule

SMALL = (
    "model.d_model=24",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.n_kv_heads=2",
    "model.ffn_hidden=40",
    "model.init_std=0.3",
    "model.max_seq_len=64",
)
ROWS, TOKENS = 3, 17
# documents of 17; of 1, 2, 3, 4 and 7; of 9 and 8, the last 5 tokens being filling
STARTS = {0: (), 1: (1, 3, 6, 10), 2: (9, 12)}


@pytest.fixture
def make(build_model):
    """make(depth, *changes, **options): a float64 model with its modules."""

    def make_model(depth, *changes, **options):
        options = {"objective": "multi_token", **options}
        return build_model(*SMALL, f"objective.depth={depth}", *changes, **options)

    return make_model


def batch(dense=False, rows=ROWS):
    generator = torch.Generator().manual_seed(0)
    window_BT = torch.randint(50, (ROWS, TOKENS + 1), generator=generator)
    starts_BT = torch.zeros(ROWS, TOKENS, dtype=torch.bool)
    for row, starts in STARTS.items():
        starts_BT[row, list(starts)] = True
    weights_BT = torch.rand(ROWS, TOKENS, generator=generator, dtype=torch.float64)
    weights_BT[2, 11:] = 0
    chosen = slice(0, rows)
    ctx = (
        SequenceContext.dense(rows, TOKENS) if dense else SequenceContext.packed(starts_BT[chosen])
    )
    return window_BT[chosen, :-1], window_BT[chosen, 1:], weights_BT[chosen], ctx


def run(objective, model, arguments):
    model.zero_grad()
    out = objective(model, *arguments)
    out.loss_sum.backward()
    return out, [p.grad.clone() for p in model.parameters()]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-10)


def normalise(x_D, norm):
    if hasattr(norm, "bias"):
        centred = x_D - x_D.mean()
        return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias
    return x_D / (x_D.square().mean() + norm.eps).sqrt() * norm.weight


def documents(ctx):
    """(row, first token, number of tokens) of every document."""
    if ctx.is_dense:
        return [(row, 0, TOKENS) for row in range(ctx.positions_BT.shape[0])]
    found = []
    for row, ids in enumerate(ctx.doc_ids_BT.tolist()):
        found += [(row, ids.index(i), ids.count(i)) for i in sorted(set(ids))]
    return found


def definition(model, tokens_BT, weights_BT, ctx, depth, z_loss=0.0):
    """(sum over k of eq. 24 times the number of tokens, sums of ce, of weights) by loops."""
    total, ces, counts = 0.0, [0.0] * depth, [0.0] * depth
    table = model.embedding.weight
    head = table if model.embedding.tied else model.head.weight
    for row, first, length in documents(ctx):
        tokens = tokens_BT[row, first : first + length]
        alone = SequenceContext.dense(1, length)
        hidden = list(model(tokens[None], alone).hidden_BTD[0])
        for k in range(1, depth + 1):
            module = model.mtp[k - 1]
            if length <= k:
                break
            x = []
            for i in range(length - k):  # eq. 21
                both = (
                    normalise(hidden[i], module.norm_hidden),
                    normalise(table[tokens[i + k]], module.norm_embedding),
                )
                x.append(module.project.weight @ torch.cat(both))
            inside = SequenceContext.dense(1, length - k)
            inside = inside.with_rotary(model.position.rotary(inside))
            y, _, _ = module.block(torch.stack(x)[None], inside)  # eq. 22
            hidden = [
                y_D
                if module.block.norm_position in ("post", "sandwich")
                else normalise(y_D, module.norm)
                for y_D in y[0]
            ]
            for i in range(length - k - 1):
                logits = (head @ hidden[i])[: model.vocab_size]  # eq. 23
                lse = logits.exp().sum().log()
                ce = lse - logits[tokens[i + k + 1]]
                weight = weights_BT[row, first + i + k]
                total = total + weight * (ce + z_loss * lse**2)  # eq. 24
                ces[k - 1] += (weight * ce).item()
                counts[k - 1] += weight.item()
    return total, ces, counts


MOE = ("channel.n_experts=4", "channel.balance_loss=0.0", "channel.z_loss=0.0")
CASES = {
    "gqa": ((), {}, False),
    "dense": ((), {}, True),
    "untied": (("model.tie_embeddings=false",), {"norm": "layernorm"}, False),
    "post": (("stack.norm_position=post",), {}, False),
    "sandwich": (("stack.norm_position=sandwich",), {}, False),
    "learned": ((), {"position": "learned"}, False),
    "hybrid": (
        ("mixers.b.window=3", "stack.pattern=ab"),
        {"mixers": {"b": "sliding_window"}},
        False,
    ),
    "mamba2": (("mixer.head_dim=12", "mixer.d_state=8"), {"mixer": "mamba2"}, False),
    "moe": (MOE, {"channel": "moe"}, False),
    "recurrent_depth": (("model.n_layers=3",), {"stack": "recurrent_depth"}, False),
    "shared_attention": (
        ("mixer.head_dim=12", "mixer.d_state=8", "model.n_layers=4"),
        {"mixer": "mamba2", "mixers": {"b": "attention"}, "stack": "shared_attention"},
        False,
    ),
}


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_definition(make, case, depth):
    changes, options, dense = CASES[case]
    model = make(depth, *changes, **options)
    tokens_BT, _, weights_BT, ctx = arguments = batch(dense)
    objective = MultiToken(depth=depth, loss_weight=0.7, z_loss=0.01)
    out, grads = run(objective, model, arguments)

    plain = Causal(z_loss=0.01)(model, *arguments)
    total, ces, counts = definition(model, tokens_BT, weights_BT, ctx, depth, z_loss=0.01)
    expected = plain.loss_sum + 0.7 / depth * total  # eq. 25
    close(out.loss_sum, expected)
    for got, want in zip(grads, torch.autograd.grad(expected, list(model.parameters()))):
        close(got, want)
    # bits per byte are the main head's
    close(out.ce_sum, plain.ce_sum)
    close(out.weight_sum, plain.weight_sum)
    for j in range(depth):
        close(out.aux[f"metric/mtp{j}/ce"].item(), ces[j] / counts[j])


def test_targets_are_the_tokens_and_weights_are_theirs(make):
    """A weight of zero takes out the target it stands at, at every depth."""
    model, (tokens, targets, weights, ctx) = make(2), batch(dense=True, rows=1)
    objective = MultiToken(depth=2)
    only = torch.zeros_like(weights)
    only[0, 9] = 1.0  # token 10: from position 9, and from 8 and 7 through the modules
    logits = []
    model.head.register_forward_hook(lambda module, inputs, out: logits.append(out.detach()))
    out = objective(model, tokens, targets, only, ctx)
    for j, (position, output) in enumerate(zip((9, 8, 7), logits, strict=True)):
        ce = -output[position, : model.vocab_size].log_softmax(-1)[tokens[0, 10]]
        close(out.ce_sum if j == 0 else out.aux[f"metric/mtp{j - 1}/ce"], ce)


@pytest.mark.parametrize("knobs", [{"chunk_tokens": 5}, {"chunk_tokens": 100}])
def test_chunks_change_no_number(make, knobs):
    model, arguments = make(2), batch()
    whole, grads = run(MultiToken(depth=2, z_loss=0.01), model, arguments)
    out, chunked = run(MultiToken(depth=2, z_loss=0.01, **knobs), model, arguments)
    close(out.loss_sum, whole.loss_sum)
    for got, want in zip(chunked, grads, strict=True):
        close(got, want)
    assert out.aux.keys() == whole.aux.keys()


def test_rows_add_to_the_whole(make):
    """The sums are over tokens, so that ranks and micro-batches can be added."""
    model, objective = make(2), MultiToken(depth=2)
    tokens, targets, weights, _ = batch(dense=True)
    whole, grads = run(objective, model, (tokens, targets, weights, SequenceContext.dense(3, 17)))
    model.zero_grad()
    parts = []
    for row in range(3):
        one = (x[row : row + 1] for x in (tokens, targets, weights))
        parts.append(objective(model, *one, SequenceContext.dense(1, TOKENS)))
        parts[-1].loss_sum.backward()
    close(sum(part.loss_sum for part in parts), whole.loss_sum)
    for parameter, expected in zip(model.parameters(), grads):
        close(parameter.grad, expected)


def test_nothing_crosses_documents(make):
    """Whatever stands in another document, inputs of no module change by a bit."""
    model = make(3)
    tokens, targets, weights, ctx = batch()
    seen = []
    for module in model.mtp:
        module.project.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    objective = MultiToken(depth=3)
    with torch.no_grad():
        objective(model, tokens, targets, weights, ctx)
        other = tokens.clone()
        other[1, 6:10] = (other[1, 6:10] + 1) % 50
        objective(model, other, targets, weights, ctx)
    for before, after in zip(seen[:3], seen[3:], strict=True):
        changed = (before != after).any(-1)
        assert changed[1, 6:10].any()
        changed[1, 6:10] = False
        assert not changed.any()


def test_only_short_documents_give_no_loss_and_no_nan(make):
    model = make(2)
    tokens, targets, weights, _ = batch()
    pairs = SequenceContext.packed(torch.arange(TOKENS).expand(ROWS, TOKENS) % 2 == 0)
    out, grads = run(MultiToken(depth=2), model, (tokens, targets, weights, pairs))
    close(out.loss_sum.detach(), out.ce_sum)
    assert out.aux["metric/mtp0/ce"] == out.aux["metric/mtp1/ce"] == 0
    assert all(grad.isfinite().all() for grad in grads)


def test_first_values_of_the_model_are_those_without_modules(make, build_model):
    plain = dict(build_model(*SMALL).named_parameters())
    both = dict(make(2).named_parameters())
    assert all(torch.equal(plain[name], both[name]) for name in plain)
    assert {name.split(".")[1] for name in both.keys() - plain.keys()} == {"0", "1"}
    assert all(name.startswith("mtp.") for name in both.keys() - plain.keys())
    assert not torch.equal(both["mtp.0.project.weight"], both["mtp.1.project.weight"])


def test_accounting(make, build_model):
    """Training multiplies through the modules, generation does not."""
    changes = ("mixer.backend=reference", "mixer.window=6")
    model, plain = make(2, *changes), build_model(*SMALL, *changes)
    counts, without = parameters_by_part(model), parameters_by_part(plain)
    own = sum(p.numel() for p in model.mtp.parameters())
    block = sum(p.numel() for p in plain.stack.blocks[1].parameters())
    assert counts.pop("mtp") == own == 2 * (2 * 24 * 24 + 3 * 24 + block)
    assert counts.pop("total") == without.pop("total") + own
    assert counts == {name: n for name, n in without.items() if name != "mtp"}
    assert flops_per_token(model, TOKENS) == flops_per_token(plain, TOKENS)

    tokens, targets, weights, ctx = batch(dense=True)
    with FlopCounterMode(display=False) as counter:
        MultiToken(depth=2)(model, tokens, targets, weights, ctx).loss_sum.backward()
    expected = ROWS * TOKENS * train_flops_per_token(model, TOKENS)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)

    assert activation_bytes(model, 100, "none") > activation_bytes(plain, 100, "none")
    for chunk, heads in ((None, 3), (10, 1)):
        sizes = [logits_bytes(m, 100, compiled=False, chunk_tokens=chunk) for m in (model, plain)]
        assert sizes[0] == heads * sizes[1]


def test_size_of_the_module_of_deepseek_v3():
    """By hand; the card of the released model says 11.5B beside embedding and head."""
    config = compose("train", ["experiment=deepseek_v3"])
    counts = parameters_by_part(build.build_model(config, vocab_size=129280, device="meta"))
    d, heads = 7168, 128
    queries = d * 1536 + 1536 + 1536 * heads * (128 + 64)
    keys_values = d * (512 + 64) + 512 + 512 * heads * (128 + 128)
    experts = (256 + 1) * 3 * d * 2048 + 256 * d
    block = queries + keys_values + heads * 128 * d + experts + 2 * d
    assert counts["mtp"] == 2 * d * d + 3 * d + block == 11_610_067_968


def test_experts_of_the_modules_are_balanced_by_themselves(make):
    changes = ("channel.n_experts=4", "channel.bias_update_speed=0.1")
    model, (tokens, targets, weights, ctx) = make(2, *changes, channel="moe"), batch()
    module = TrainModule(model, MultiToken(depth=2), torch.ones(50))
    _, _, aux = module(
        MicroBatch(tokens_BT=tokens, targets_BT=targets, weights_BT=weights, ctx=ctx)
    )
    own = {key: value for key, value in aux.items() if key.startswith("sum/mtp1/")}
    assert own
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    module.after_step(own)
    changed = {name for name, x in model.named_buffers() if not torch.equal(x, before[name])}
    assert changed
    assert all(name.startswith("mtp.1.block.channel.") for name in changed)


def test_recomputation_changes_no_gradient(make):
    model, arguments = make(2), batch()
    whole, grads = run(MultiToken(depth=2), model, arguments)
    model.stack.activation_checkpointing = "full"
    calls = []
    model.mtp[1].project.register_forward_hook(lambda *_: calls.append(1))
    out, again = run(MultiToken(depth=2), model, arguments)
    assert len(calls) == 2
    assert torch.equal(out.loss_sum, whole.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))


def test_losses_and_metrics_of_the_modules_blocks_have_names_of_their_own(make):
    model = make(2, "channel.activation_l1=0.5", channel="relu2")
    arguments = batch()
    objective = MultiToken(depth=2)
    out, grads = run(objective, model, arguments)
    names = ["loss/activation_l1", "loss/mtp0/activation_l1", "loss/mtp1/activation_l1"]
    metrics = [f"metric/{at}/sparsity" for at in ("l00", "l01", "mtp0", "mtp1")]
    assert sorted(out.aux) == sorted([*names, *metrics, "metric/mtp0/ce", "metric/mtp1/ce"])
    further = sum(0.15 * out.aux[f"metric/mtp{j}/ce"] * n for j, n in enumerate(counted()))
    expected = out.ce_sum + further + out.weight_sum * sum(out.aux[name] for name in names)
    close(out.loss_sum.detach(), expected.detach())
    free = make(2, "channel.activation_l1=0.0", channel="relu2")
    _, without = run(objective, free, arguments)
    up = [name for name, _ in model.named_parameters()].index("mtp.1.block.channel.up.weight")
    assert not torch.allclose(grads[up], without[up])


def counted(depth=2):
    """Sum of the weights that count at every depth, by loops."""
    _, _, weights_BT, ctx = batch()
    sums = [0.0] * depth
    for row, first, length in documents(ctx):
        for k in range(1, depth + 1):
            sums[k - 1] += sum(weights_BT[row, first + i + k].item() for i in range(length - k - 1))
    return sums


def test_one_graph(make):
    torch._dynamo.reset()
    model, arguments = make(2).float(), batch()
    model.compute_dtype = torch.float32
    arguments = (*arguments[:2], arguments[2].float(), arguments[3])
    objective = MultiToken(depth=2, chunk_tokens=20)
    whole, grads = run(objective, model, arguments)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True, dynamic=False)
    out, again = run(compiled, model, arguments)
    torch.testing.assert_close(out.loss_sum, whole.loss_sum, atol=1e-4, rtol=1e-4)
    for got, want in zip(again, grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"depth": 0}, r"depth: got 0, expected >= 1; set objective.depth, or use objective=caus"),
        ({"loss_weight": 0.0}, r"loss_weight: got 0.0, expected > 0; set objective.loss_weight"),
        ({"z_loss": -1.0}, r"z_loss: got -1.0, expected >= 0"),
    ],
)
def test_knobs_out_of_range(knobs, message):
    with pytest.raises(ValueError, match=message):
        MultiToken(**knobs)


def test_rows_too_short_for_the_depth(make):
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    arguments = (tokens, tokens, torch.ones(1, 3), SequenceContext.dense(1, 3))
    assert MultiToken(depth=1)(make(1), *arguments).aux["metric/mtp0/ce"] > 0
    message = r"objective.depth: got 2 with rows of 3 tokens, expected at most 1, so that"
    with pytest.raises(ValueError, match=message):
        MultiToken(depth=2)(make(2), *arguments)


def test_a_model_without_the_modules(make, build_model):
    with pytest.raises(ValueError, match=r"got depth=2 for a model of 1 modules, expected as man"):
        MultiToken(depth=2)(make(1), *batch())
    with pytest.raises(ValueError, match=r"got depth=2 for a model of 0 modules"):
        MultiToken(depth=2)(build_model(*SMALL), *batch())


def test_a_mixer_that_sees_later_tokens(make, monkeypatch):
    monkeypatch.setattr("llmtrain.mixers.attention.Attention.causal", False)
    with pytest.raises(ValueError, match=r"multi_token: the last layer's mixer Attention sees la"):
        make(1)
