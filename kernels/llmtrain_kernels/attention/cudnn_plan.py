"""Plans of cuDNN's attention over packed documents, and their execution.

NVIDIA's frontend describes a batch of N sequences of at most S tokens. Packed, every tensor has
beside its sizes [N, heads, S, width] and strides a ragged offset: the element at which document n
begins. Documents without tokens cost nothing but their place in the grid, and S only bounds the
longest, so a plan for round numbers serves all below them: both are rounded up to powers of two.
A plan takes 50 to 700 ms to build. There are about 10 rounded N times 10 rounded S for a layer's
shape; a training run, whose rows have one length and whose boundaries are filled up to a power of
two, sees two or three. They are never dropped, since a captured CUDA graph may hold their kernels.

The backward graph is told the number of all tokens (rounded up too, to four bits): without it, its
float32 sums of dq and, for grouped heads, of dk and dv of every head take N * S tokens of
workspace. With it, B8 T4096 K128 takes 270 MB for H16/16 and 807 MB for H16/8.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmtrain_kernels.attention.cudnn_shapes import OFFSET_OF, Key, Numbers, operands, ragged
from llmtrain_kernels.attention.cudnn_trial import trial

log = logging.getLogger(__name__)

MANY = 32  # plans; more say that shapes vary in a way that rounding does not catch


def uids(key: Key) -> dict[str, int]:
    """The names of a graph's buffers, numbered; lengths are those of queries and of keys."""
    found = operands(key)
    offsets = [f"{name} offsets" for name in found if name not in OFFSET_OF]
    names = [*found, *offsets, "query lengths", "key lengths"]
    return {name: uid for uid, name in enumerate(names, start=1)}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """graph: the frontend's, built. names: of its tensors of tokens. uids: of these, of offsets and
    of lengths. workspace: bytes. token_strides_R1: int64, on the device, of the operands that have
    offsets of their own."""

    graph: Any
    names: tuple[str, ...]
    uids: tuple[int, ...]
    workspace: int
    token_strides_R1: Tensor


def execute(
    key: Key, tensors: dict[str, Tensor], cu_seqlens: Tensor, numbers: Numbers | None = None
) -> Numbers:
    """Run the plan of key on tensors, named as by operands(); results are written into them.
    numbers: what the forward plan returned for the same cu_seqlens; None makes them anew."""
    with torch.cuda.device(key.device):
        return run(build(key), key, tensors, cu_seqlens, numbers)


def run(
    plan: Plan,
    key: Key,
    tensors: dict[str, Tensor],
    cu_seqlens: Tensor,
    numbers: Numbers | None = None,
) -> Numbers:
    """execute() on the current device."""
    if numbers is None:
        numbers = ragged(cu_seqlens, key.documents, plan.token_strides_R1)
    workspace = torch.empty(plan.workspace, dtype=torch.uint8, device=cu_seqlens.device)
    buffers = [*(tensors[name] for name in plan.names), *numbers]
    handle = current_handle(key.device)
    plan.graph.execute(buffers, workspace, handle=handle, tensor_uids=plan.uids)
    return numbers


def current_handle(device: int) -> Any:
    """cuDNN's handle for this thread, on torch's current stream."""
    import cudnn  # NVIDIA's package

    handle = handles(device, threading.get_ident())
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


@functools.cache
def handles(device: int, thread: int) -> Any:
    """A handle must not be used by two threads at once: backward passes have threads of theirs."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@functools.cache
def build(key: Key) -> Plan:
    """The plan of a key, which was tried. Raises RuntimeError while a CUDA graph is captured, and
    for a plan that is wrong (cudnn_trial.py)."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"attention backend=cudnn: got a new shape ({key}) while a CUDA graph is captured, "
            "expected one that ran before, since its plan cannot be built now; run the step "
            "once before capturing it"
        )
    start = time.perf_counter()
    graph = describe(key, current_handle(key.device))
    graph.build(heuristics())
    found = operands(key)
    strides = [[x.token_stride] for name, x in found.items() if name not in OFFSET_OF]
    made = Plan(
        graph=graph,
        names=tuple(found),
        uids=tuple(uids(key).values()),
        workspace=max(1, graph.get_workspace_size()),
        token_strides_R1=torch.tensor(strides, device=torch.device("cuda", key.device)),
    )

    def tried(of: Key, tensors: dict[str, Tensor], cu_seqlens: Tensor) -> None:
        run(made if of == key else build(of), of, tensors, cu_seqlens)

    trial(key, tried, made.token_strides_R1.device)
    took = time.perf_counter() - start
    log.info("cuDNN plan for %s: %.0f ms, workspace %d", key, 1e3 * took, made.workspace)
    if build.cache_info().currsize + 1 == MANY:
        log.warning("attention backend=cudnn: %d plans; shapes vary much, each costs time", MANY)
    return made


def heuristics() -> list[Any]:
    """Where engines come from: the best guess, then what runs more generally."""
    import cudnn

    return [cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK]


def describe(key: Key, handle: Any) -> Any:
    """The frontend's graph of a key, not built."""
    import cudnn

    drawing = Drawing(key, handle)
    options = drawing.options()
    q, k, v = (drawing.given(name) for name in ("q", "k", "v"))
    if not key.backward:
        made = drawing.graph.sdpa(
            q=q,
            k=k,
            v=v,
            generate_stats=True,
            implementation=cudnn.attention_implementation.COMPOSITE,
            **options,
        )
        drawing.results(("o", "lse"), made)
        return drawing.graph
    o, lse, do = (drawing.given(name) for name in ("o", "lse", "do"))
    made = drawing.graph.sdpa_backward(
        q=q,
        k=k,
        v=v,
        o=o,
        dO=do,
        stats=lse,
        max_total_seq_len_q=key.tokens,
        max_total_seq_len_kv=key.tokens,
        **options,
    )
    drawing.results(("dq", "dk", "dv"), made)
    return drawing.graph


class Drawing:
    """A graph of the frontend while its tensors are described."""

    def __init__(self, key: Key, handle: Any):
        import cudnn

        self.key, self.cudnn = key, cudnn
        self.operands, self.uids = operands(key), uids(key)
        half = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        self.data_type = half[key.dtype]
        self.graph = cudnn.pygraph(
            io_data_type=self.data_type,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )
        self.offsets = {
            name: self.numbers(f"{name} offsets", key.documents + 1, cudnn.data_type.INT64)
            for name in self.operands
            if name not in OFFSET_OF
        }

    def numbers(self, name: str, count: int, data_type: Any) -> Any:
        """A vector of whole numbers."""
        size, stride = [count, 1, 1, 1], [1, 1, 1, 1]
        return self.graph.tensor(size, stride, data_type, name=name, uid=self.uids[name])

    def options(self) -> dict[str, Any]:
        """What forward and backward graphs are both told."""
        cudnn, documents = self.cudnn, self.key.documents
        found = {
            "attn_scale": self.key.scale,
            "use_padding_mask": True,  # ragged offsets alone say not where a document ends
            "seq_len_q": self.numbers("query lengths", documents, cudnn.data_type.INT32),
            "seq_len_kv": self.numbers("key lengths", documents, cudnn.data_type.INT32),
            "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        }
        return found | ({"diagonal_band_right_bound": 0} if self.key.causal else {})

    def layout(self, name: str) -> tuple[list[int], list[int], Any]:
        """(sizes, strides, type) of an operand."""
        x, longest = self.operands[name], self.key.longest
        size = [self.key.documents, x.heads, longest, x.width]
        stride = [longest * x.token_stride, x.width, x.token_stride, 1]
        return size, stride, self.cudnn.data_type.FLOAT if name == "lse" else self.data_type

    def given(self, name: str) -> Any:
        tensor = self.graph.tensor(*self.layout(name), name=name, uid=self.uids[name])
        return tensor.set_ragged_offset(self.offsets[OFFSET_OF.get(name, name)])

    def results(self, names: tuple[str, ...], tensors: list[Any]) -> None:
        for name, tensor in zip(names, tensors, strict=True):
            size, stride, data_type = self.layout(name)
            tensor.set_uid(self.uids[name]).set_output(True).set_data_type(data_type)
            offsets = self.offsets[OFFSET_OF.get(name, name)]
            tensor.set_dim(size).set_stride(stride).set_ragged_offset(offsets)
