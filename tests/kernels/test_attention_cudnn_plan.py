"""Plans of cuDNN's attention: their shapes, what NVIDIA's package is told, and their trial."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from cudnn_stand_in import stand_in
from llmtrain_kernels.attention import cudnn_plan, cudnn_shapes, cudnn_trial


def test_addressable():
    x = torch.zeros(3, 2, 16, dtype=torch.bfloat16)
    assert cudnn_shapes.addressable(x) is x
    others = [
        x.transpose(1, 2),
        torch.zeros(3, 1, 16, dtype=torch.bfloat16).expand(3, 2, 16),
        torch.zeros(97, dtype=torch.bfloat16)[1:].view(3, 2, 16),
        torch.zeros(3, 36, dtype=torch.bfloat16)[:, :32].view(3, 2, 16),
        torch.zeros(3, 6, 16, dtype=torch.bfloat16)[:, 2:4],  # of one projection
    ]
    for other in others:
        made = cudnn_shapes.addressable(other)
        assert made.is_contiguous()
        assert made.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("bound", [128, 512])
def test_a_plan_that_is_right_passes_its_trial(backward, causal, bound):
    tried = key(backward=backward, causal=causal)._replace(dtype=torch.float32, longest=bound)
    seen = []

    def run(key, tensors, cu_seqlens):
        seen.append((key.backward, cu_seqlens.tolist()))
        stand_in(key, tensors, cu_seqlens)

    cudnn_trial.trial(tried, run, torch.device("cpu"))
    ends = [0, *((300, 301, 364) if bound == 512 else (128, 129, 192))]
    assert seen == [(False, ends), (True, ends)][: 1 + backward]
    cudnn_trial.trial(tried._replace(scale=3.0), run, torch.device("cpu"))
    least = tried._replace(tokens=128 if backward else 0)
    cudnn_trial.trial(least, run, torch.device("cpu"))
    assert not backward or seen[-1][1][-1] <= 128


@pytest.mark.parametrize("wrong", ["o", "dq", "dk", "dv"])
@pytest.mark.parametrize("fault", ["nan", "left", "another head's", "off"])
def test_a_plan_that_is_wrong_is_refused(wrong, fault):
    tried = key(backward=wrong.startswith("d"))._replace(dtype=torch.float32)

    def run(key, tensors, cu_seqlens):
        stand_in(key, tensors, cu_seqlens)
        if key != tried:
            return
        x = tensors[wrong]
        x.copy_({"nan": x * torch.nan, "left": 0 * x, "off": x * 1.00001}.get(fault, x.roll(1, 2)))

    with pytest.raises(RuntimeError, match=f"a plan of cuDNN .*{wrong} .*mixer.backend=varlen"):
        cudnn_trial.trial(tried, run, torch.device("cpu"))


def test_offsets():
    """Wider than int32, 16 bytes apart, and empty documents at the end of the tokens."""
    boundaries = torch.tensor([0, 7, 1 << 20, 1 << 20], dtype=torch.int32)
    *offsets, q_lengths, k_lengths = cudnn_shapes.ragged(
        boundaries, 8, torch.tensor([[1 << 14], [3]])
    )
    assert q_lengths is k_lengths
    assert q_lengths.dtype == torch.int32
    assert q_lengths.tolist()[:8] == [7, (1 << 20) - 7] + [0] * 6
    for s, x in zip((1 << 14, 3), offsets, strict=True):
        assert x.dtype == torch.int64
        assert x.tolist() == [0, 7 * s] + [s << 20] * 8
        assert x.storage_offset() * x.element_size() % 16 == 0


def test_bounds_are_rounded():
    assert [cudnn_shapes.power_of_two(n, 16) for n in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]
    rows = {
        (700, 4096): 1024,
        (4096, 4096): 4096,
        (3000, 3000): 3072,
        (1, 19): 128,
        (600, 600): 640,
    }
    assert {args: cudnn_shapes.rounded_longest(*args) for args in rows} == rows
    for tokens in (1, 128, 129, 16384, 16385, 99999, 1 << 20):
        rounded = cudnn_shapes.rounded_tokens(tokens)
        assert tokens <= rounded <= max(128, tokens * 9 / 8 + 128)
    assert len({cudnn_shapes.rounded_tokens(n) for n in range(1, 1 << 17)}) <= 8 * 8


def key(documents=20, longest=500, rows=2, row=4096, *, heads=4, backward=False, **how):
    how = {"causal": True, "scale": 0.125, **how}
    q, k = (torch.zeros(rows, row, n, 64, dtype=torch.bfloat16, device="meta") for n in (heads, 2))
    boundaries = torch.zeros(documents + 1, dtype=torch.int32, device="meta")
    return cudnn_shapes.make_key(q, k, k, boundaries, longest, backward=backward, **how)


def test_plans_are_few():
    assert key() == key(documents=32, longest=257, rows=1)
    assert key(backward=True) == key(documents=17, rows=1, row=8191, backward=True)
    changes = [{"documents": 33}, {"longest": 513}, {"heads": 8}, {"scale": 0.1}, {"causal": False}]
    assert len({key(), key(backward=True), *(key(**change) for change in changes)}) == 7
    seen = {key(n, longest, backward=True) for n in range(1, 4097, 5) for longest in (1, 999, 4096)}
    assert len(seen) <= 9 * 3


def test_no_plan_is_built_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"backend=cudnn: got a new shape .*run the step once"):
        cudnn_plan.build(key())


class Recorded:
    """A tensor of NVIDIA's graph, which remembers what it was told."""

    def __init__(self, **told):
        self.told = told

    def __getattr__(self, name):
        def setter(value):
            self.told[name.removeprefix("set_")] = value
            return self

        return setter


@pytest.fixture
def package(monkeypatch):
    """NVIDIA's module, as far as describe() needs it; .tensors and .calls are what it was told."""
    module = ModuleType("cudnn")
    module.tensors, module.calls = [], []
    types = ("BFLOAT16", "HALF", "FLOAT", "INT32", "INT64")
    module.data_type = SimpleNamespace(**{name: name for name in types})
    module.diagonal_alignment = SimpleNamespace(TOP_LEFT="top left")
    module.attention_implementation = SimpleNamespace(COMPOSITE="composite")

    class Graph:
        def __init__(self, **options):
            pass

        def tensor(self, dim, stride, data_type, *, name, uid):
            made = Recorded(dim=dim, stride=stride, data_type=data_type, name=name, uid=uid)
            module.tensors.append(made)
            return made

        def made(self, count, options):
            module.calls.append(options)
            results = [Recorded() for _ in range(count)]
            module.tensors += results
            return results

        def sdpa(self, **options):
            return self.made(2, options)

        def sdpa_backward(self, **options):
            return self.made(3, options)

    module.pygraph = Graph
    monkeypatch.setitem(sys.modules, "cudnn", module)
    return module


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_graphs(package, backward, causal):
    """Every buffer has its number, and what holds tokens has sizes, strides and a ragged offset."""
    described = key(backward=backward, causal=causal)
    cudnn_plan.describe(described, handle=None)
    told = {x.told["uid"]: x.told for x in package.tensors}
    names = cudnn_plan.uids(described)
    assert set(told) == set(names.values())
    for name, operand in cudnn_shapes.operands(described).items():
        x = told[names[name]]
        assert x["dim"] == [32, operand.heads, 512, operand.width]
        assert x["stride"] == [512 * operand.token_stride, operand.width, operand.token_stride, 1]
        assert x["data_type"] == ("FLOAT" if name == "lse" else "BFLOAT16")
        offsets = x["ragged_offset"].told
        assert offsets["uid"] == names[f"{cudnn_shapes.OFFSET_OF.get(name, name)} offsets"]
        assert (offsets["dim"], offsets["data_type"]) == ([33, 1, 1, 1], "INT64")
    (options,) = package.calls
    assert options["use_padding_mask"] is True
    assert options.get("diagonal_band_right_bound") == (0 if causal else None)
    assert options.get("max_total_seq_len_q") == (8192 if backward else None)
