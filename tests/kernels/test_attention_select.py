"""The choice of a backend without a GPU, and what the GPU backends hand to their libraries.

torch's varlen and the flash-attn package need CUDA. Here functions with their signatures, which
compute by the reference, stand in for them; kernels/bench/attention.py checks the real ones.
"""

import logging
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch._dynamo.testing
from llmtrain_kernels.attention import (
    BACKENDS,
    Case,
    attention,
    choice,
    flash_attn,
    op,
    sdpa,
    select_backend,
    varlen,
)
from llmtrain_kernels.attention.select import announced

H100 = Case(
    device="cuda",
    capability=(9, 0),
    dtype=torch.bfloat16,
    heads=12,
    kv_heads=4,
    k_width=64,
    v_width=64,
    training=True,
)
PACKED = {"documents": True, "boundaries": True}
NEW = frozenset({"window_size", "scale", "enable_gqa"})


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """The newest torch, no flash-attn package."""
    monkeypatch.setattr(varlen, "PARAMETERS", NEW)
    monkeypatch.setattr(flash_attn, "INSTALLED", False)


@pytest.mark.parametrize(
    ("change", "backend", "slow"),
    [
        ({}, "sdpa", False),
        (PACKED, "varlen", False),
        ({"window": 128}, "varlen", False),
        ({**PACKED, "window": 128, "dtype": torch.float16}, "varlen", False),
        ({**PACKED, "training": False}, "varlen", False),
        ({"documents": True}, "flex", False),  # no boundaries given
        ({**PACKED, "k_width": 192, "v_width": 128}, "varlen", False),  # values padded
        ({"k_width": 192, "v_width": 128}, "sdpa", False),
        ({**PACKED, "k_width": 64, "v_width": 288}, "flex", False),
        ({**PACKED, "k_width": 320, "v_width": 320}, "flex", False),
        ({**PACKED, "k_width": 8, "v_width": 12}, "varlen", False),
        ({**PACKED, "k_width": 8, "v_width": 264}, "sdpa", True),
        ({**PACKED, "capability": (7, 5)}, "flex", False),
        ({**PACKED, "dtype": torch.float32}, "sdpa", True),
        ({"dtype": torch.float32}, "sdpa", False),
        ({"cache": True, "training": False}, "sdpa", False),
        ({"cache": True, "window": 64, "training": False}, "sdpa", False),
        ({"device": "cpu", "capability": None}, "sdpa", False),
        ({**PACKED, "device": "cpu", "capability": None, "dtype": torch.float64}, "sdpa", False),
        ({"window": 9, "device": "cpu", "capability": None}, "sdpa", False),
        ({**PACKED, "device": "meta", "capability": None}, "sdpa", False),
        ({**PACKED, "window": 128, "sinks": 4}, "flex", False),
        ({"window": 9, "sinks": 4, "device": "cpu", "capability": None}, "sdpa", False),
        ({"softcap": True}, "flex", False),
        ({**PACKED, "softcap": True, "dtype": torch.float32}, "flex", False),
        ({"softcap": True, "k_width": 8}, "eager", True),
        ({"softcap": True, "cache": True, "training": False}, "eager", False),
        ({"softcap": True, "device": "cpu", "capability": None}, "eager", False),
    ],
    ids=str,
)
def test_auto(change, backend, slow):
    case = replace(H100, **change)
    choice = select_backend(case)
    assert (choice.backend, choice.slow) == (backend, slow)
    assert BACKENDS[backend].unsupported(case) is None


def test_auto_without_a_window_in_varlen(monkeypatch):
    monkeypatch.setattr(varlen, "PARAMETERS", frozenset({"is_causal"}))
    assert select_backend(replace(H100, **PACKED)).backend == "varlen"
    windowed = replace(H100, **PACKED, window=128)
    choice = select_backend(windowed)
    assert choice.backend == "flex"
    assert "varlen torch" in choice.reason
    assert "flash_attn is not installed" in choice.reason
    monkeypatch.setattr(flash_attn, "INSTALLED", True)
    assert select_backend(windowed).backend == "flash_attn"
    assert select_backend(replace(H100, softcap=True)).backend == "flash_attn"


@pytest.mark.parametrize(
    ("requested", "change", "message"),
    [
        ("varlen", {"dtype": torch.float32}, "needs bfloat16 or float16 on CUDA; got cuda float32"),
        ("varlen", {"capability": (7, 5)}, r"needs compute capability 8.0, this device has \(7, 5"),
        ("varlen", {"k_width": 320}, "needs key and value widths of at most 256, not 320 and 64"),
        ("varlen", {"cache": True}, "takes no mask, so it cannot read a cache"),
        ("varlen", {"documents": True}, "needs cu_seqlens and max_seqlen for packed documents"),
        ("flash_attn", PACKED, r"is not installed: pip install 'llmtrain\[flash-attn\]'"),
        ("varlen", {**PACKED, "window": 8, "sinks": 2}, "takes no mask, so it cannot show sinks"),
        ("varlen", {"softcap": True}, "has no softcap"),
        ("sdpa", {"softcap": True}, "has no softcap"),
        ("flex", {"cache": True}, "is not used for reading a cache"),
        ("flex", {"device": "cpu"}, "has no backward pass on the CPU"),
        ("flex", {"dtype": torch.float64}, "has no float64 kernel"),
        ("flex", {"k_width": 8}, "needs widths of at least 16, not 8 and 64"),
    ],
)
def test_a_named_backend_that_cannot_run(requested, change, message):
    with pytest.raises(ValueError, match=f"backend={requested}: {message}") as error:
        select_backend(replace(H100, **change), requested)
    assert str(error.value).endswith("set mixer.backend=auto")


def test_unknown_backend():
    with pytest.raises(ValueError, match="got 'fast', expected auto or one of reference, sdpa, "):
        select_backend(H100, "fast")
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ValueError, match=r"attention backend: got 'fast', .* set mixer.backend"):
        attention(q, q, q, backend="fast")


def test_choice_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="llmtrain_kernels")
    announced.cache_clear()
    torch._dynamo.reset()
    q = torch.randn(1, 3, 1, 8)
    for call in (attention, attention, torch.compile(attention, backend="eager", fullgraph=True)):
        call(q, q, q)
    message = "attention: sdpa for cpu float32, heads 1/1 x 8, inference (dense rows)"
    assert caplog.messages == [message]
    assert caplog.records[0].levelno == logging.INFO
    caplog.clear()
    announced(replace(H100, dtype=torch.float32, **PACKED), "auto")
    assert caplog.records[0].levelno == logging.WARNING
    assert "half precision has faster ones" in caplog.text


def test_reason_names_the_order_of_cuda_kernels():
    assert select_backend(H100).reason == "dense rows, cuDNN first"
    assert select_backend(replace(H100, training=False)).reason == "dense rows"
    assert select_backend(replace(H100, capability=(8, 0))).reason == "dense rows"


def test_reason_names_padding():
    latent = replace(H100, k_width=192, v_width=128)
    padded = "widths 192 and 128 padded to 192"
    assert select_backend(latent).reason == f"dense rows, cuDNN first, {padded}"
    assert select_backend(replace(latent, **PACKED)).reason == f"skips hidden pairs, {padded}"
    assert select_backend(replace(latent, device="cpu")).reason == "dense rows"
    assert "padded" not in select_backend(replace(latent, **PACKED, capability=(7, 5))).reason


def test_a_window_that_hides_nothing_is_none(caplog):
    caplog.set_level(logging.INFO, logger="llmtrain_kernels")
    announced.cache_clear()
    q = torch.randn(1, 3, 1, 8)
    assert attention(q, q, q, window=3).equal(attention(q, q, q))
    assert len(caplog.messages) == 1
    assert not attention(q, q, q, window=2).equal(attention(q, q, q))


def test_a_compiled_first_call_is_logged(caplog):
    caplog.set_level(logging.INFO, logger="llmtrain_kernels")
    announced.cache_clear()
    torch._dynamo.reset()
    q = torch.randn(1, 3, 1, 24)
    torch.compile(attention, backend="eager", fullgraph=True)(q, q, q)
    assert [m for m in caplog.messages if "heads 1/1 x 24" in m]


def by_reference(q_NHK, k_NGK, v_NGV, boundaries, longest, causal, window, scale, softcap=None):
    """What a varlen kernel computes, from its own arguments."""
    assert q_NHK.shape[-1] == k_NGK.shape[-1] == v_NGV.shape[-1]
    assert q_NHK.shape[-1] % 8 == 0
    ends = boundaries[1:].tolist()
    assert max(b - a for a, b in zip([0, *ends], ends)) <= longest
    ids_N = torch.bucketize(torch.arange(q_NHK.shape[0]), boundaries[1:], right=True)
    left, right = window
    if causal:
        right = 0
    assert right in (0, left)
    o_1NHV = attention(
        *(x[None] for x in (q_NHK, k_NGK, v_NGV)),
        causal=right == 0,
        window=None if left < 0 else left + 1,
        scale=scale,
        softcap=softcap,
        doc_ids_BT=ids_N[None],
        backend="reference",
    )
    return o_1NHV[0]


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    return by_reference(query, key, value, cu_seq_q, max_q, is_causal, (-1, -1), None)


def varlen_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
):
    return by_reference(query, key, value, cu_seq_q, max_q, False, window_size, scale)


def varlen_2_12(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return by_reference(query, key, value, cu_seq_q, max_q, False, window_size, scale)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
):
    cap = softcap or None
    return by_reference(q, k, v, cu_q, max_q, causal, window_size, softmax_scale, cap)


STAND_INS = {
    "2.10": (varlen, varlen_2_10, frozenset({"is_causal"})),
    "2.11": (varlen, varlen_2_11, frozenset({"scale", "window_size"})),
    "2.12": (varlen, varlen_2_12, NEW),
    "flash_attn": (flash_attn, flash_attn_varlen_func, None),
}


@pytest.fixture(params=STAND_INS)
def flash_backend(request, monkeypatch):
    """(the backend's run, whether it has windows, whether it caps) on top of a stand-in."""
    module, function, parameters = STAND_INS[request.param]
    if module is varlen:
        monkeypatch.setattr(varlen, "varlen_attn", function)
        monkeypatch.setattr(varlen, "PARAMETERS", parameters)
    else:
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = function
        monkeypatch.setitem(sys.modules, "flash_attn", package)
    return module.run, request.param != "2.10", module is flash_attn


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("widths", [(8, 8), (20, 16), (6, 13)], ids=str)
def test_flash_backends(flash_backend, causal, heads, widths):
    """Rows are flattened, boundaries padded with empty documents, windows and scales translated,
    keys and values made equally wide."""
    run, has_window, caps = flash_backend
    shapes = (heads, widths[0]), (2, widths[0]), (2, widths[1])
    q, k, v = (torch.randn(2, 9, *shape, dtype=torch.float64) for shape in shapes)
    starts_BT = torch.zeros(2, 9, dtype=torch.bool)
    starts_BT[0, [0, 4, 5]] = True
    starts_BT[1, 0] = True
    boundaries = torch.tensor([0, 4, 5, 9, 18, 18, 18], dtype=torch.int32)
    documents = {
        "doc_ids_BT": starts_BT.cumsum(dim=1),
        "cu_seqlens": boundaries,
        "max_seqlen": 9,
    }
    calls = [{**documents}, {**documents, "scale": 0.2}]
    if has_window:
        calls += [{**documents, "window": 3}, {"window": 3}]
    if caps:
        calls += [{**documents, "softcap": 0.3}]
    for arguments in calls:
        got = run(q, k, v, causal=causal, **arguments)
        expected = attention(q, k, v, causal=causal, backend="reference", **arguments)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_varlen_compiles_for_any_documents(monkeypatch):
    """One graph, and no compilation for every new number of documents or longest document."""

    @torch.library.custom_op("llmtrain_test::varlen", mutates_args={})
    def flat(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor, longest: int
    ) -> torch.Tensor:
        return by_reference(q, k, v, cu, longest, False, (-1, 0), None)

    flat.register_fake(lambda q, k, v, cu, longest: torch.empty_like(q))

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert window_size == (-1, 0)
        return flat(q, k, v, cu_q, max_q)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(varlen.run, fullgraph=True, backend=counter)
    q = torch.randn(1, 40, 2, 8)
    for every in (1, 2, 3, 5, 8, 13, 20, 40):
        ids_BT = (torch.arange(40) // every)[None]
        ends = torch.arange(every, 40 + every, every, dtype=torch.int32).clamp(max=40)
        boundaries = torch.cat([torch.zeros(1, dtype=torch.int32), ends])
        arguments = {"doc_ids_BT": ids_BT, "cu_seqlens": boundaries, "max_seqlen": every}
        expected = attention(q, q, q, backend="reference", **arguments)
        torch.testing.assert_close(compiled(q, q, q, **arguments), expected)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("widths", [(12, 8), (8, 12)], ids=str)
def test_sdpa_with_padded_widths(monkeypatch, widths):
    """What CUDA in half precision does for flash and cuDNN gives the same anywhere."""
    q, k, v = (torch.randn(2, 9, 4, w, dtype=torch.float64) for w in (*widths[:1] * 2, widths[1]))
    seen = []

    def spy(q, k, v, **options):
        seen.append([x.shape[-1] for x in (q, k, v)])
        return original(q, k, v, **options)

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(sdpa, "pads", lambda q, v_width, masked: not masked)
    for scale in (None, 0.2):
        got = attention(q, k, v, scale=scale, backend="sdpa")
        expected = attention(q, k, v, scale=scale, backend="reference")
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert seen == [[16, 16, 16]] * 2


@pytest.mark.parametrize("name", sorted(path.stem for path in choice.FOLDER.glob("*.toml")))
def test_tables_of_choices(name):
    """Every situation has an order for every case, of backends that exist."""
    read = choice.table(name)
    assert set(read) == set(choice.SITUATIONS)
    assert not choice.unknown(read, BACKENDS)
    for situation, last in (("packed", "sdpa"), ("window", "sdpa"), ("softcap", "eager")):
        assert choice.order(name, situation, tokens=None, k_width=10**6)[-1] == last
    assert select_backend(replace(H100, table=name, **PACKED)).backend == "varlen"


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """choices/mine.toml: flex for packed rows of up to 1024 tokens and heads of up to 64."""
    for path in choice.FOLDER.glob("*.toml"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.setattr(choice, "FOLDER", tmp_path)
    entries = [
        {"tokens_up_to": 1024, "k_width_up_to": 64, "order": ["flex", "sdpa"]},
        {"order": ["varlen", "sdpa"]},
    ]
    choice.write(tmp_path / "mine.toml", {"packed": entries}, heading="Measured.\n\nHere.")
    for cached in (choice.table, choice.token_bounds, choice.device_name):
        cached.cache_clear()
    yield tmp_path / "mine.toml"
    for cached in (choice.table, choice.token_bounds, choice.device_name):
        cached.cache_clear()


def test_a_table_decides_by_shape(own_table):
    case = replace(H100, table="mine", **PACKED)
    assert own_table.read_text().startswith("# Measured.\n#\n# Here.\n\n[[packed]]\ntokens_up_to")
    assert choice.token_bounds("mine") == (1024,)
    assert [choice.token_class(t, (1024,)) for t in (1, 1024, 1025)] == [1024, 1024, None]
    assert select_backend(replace(case, tokens=1024)).backend == "flex"
    assert select_backend(replace(case, tokens=1024, k_width=128)).backend == "varlen"
    assert select_backend(case).backend == "varlen"
    assert select_backend(replace(case, window=9)).backend == "varlen"  # as default.toml has it


def test_a_device_has_the_table_of_its_name(own_table, monkeypatch):
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA Mine-2": "mine", "NVIDIA A10": "default"}
    for given, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda ordinal, given=given: given)
        choice.device_name.cache_clear()
        assert choice.device_name(0) == expected


@pytest.mark.parametrize(
    "text",
    [
        '[[packed]]\ntokens_up_to = 9\norder = ["varlen"]',
        "[[packed]]\ntokens = 9\norder = []",
        '[[packed]]\nk_width = 9\norder = ["varlen"]',
        '[[dens]]\norder = ["sdpa"]',
        "[[dense]]\norder = []",
    ],
)
def test_tables_with_mistakes(own_table, text):
    own_table.write_text(text)
    choice.table.cache_clear()
    with pytest.raises(ValueError, match=r"mine.toml: got \[\[\w+\]\] .* mend the table"):
        choice.table("mine")


def test_bounds_leave_the_number_of_tokens_open(monkeypatch):
    """One compilation for rows below a bound, one above it."""
    monkeypatch.setattr(op, "token_bounds", lambda name: (16,))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for tokens in (4, 5, 9, 16, 17, 30, 40):
        q = torch.randn(1, tokens, 2, 8)
        torch._dynamo.mark_dynamic(q, 1)
        torch.testing.assert_close(compiled(q, q, q), attention(q, q, q))
    assert counter.frame_count == 2
