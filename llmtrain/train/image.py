"""What one rank's file of a checkpoint will hold, byte for byte, made from live tensors.

An image is copied into host memory as a whole (Copied: training may go on and change the tensors),
or chunk by chunk as the file is written (Streamed: it may not, but needs no memory).
"""

from __future__ import annotations

import bisect
import json
import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.fragments import CODES
from llmtrain.manifest import CHUNK_BYTES
from llmtrain.train.partitions import Fragment

log = logging.getLogger(__name__)

# Chunks that may be hashed while the next are copied and written.
AHEAD = 4
# Of the memory that is written from: direct I/O asks for it.
ALIGNMENT = 4096


@dataclass(frozen=True)
class Image:
    """A safetensors file. starts, tensors: bytes in the file where each 1-D tensor begins.

    kinds: parameter -> the kinds of its fragments.
    """

    header: bytes
    starts: list[int]
    tensors: list[Tensor]
    size: int
    kinds: dict[str, list[str]]

    @classmethod
    def of(cls, fragments: list[Fragment], generators: dict[str, Tensor], rank: int) -> Image:
        tensors = {
            f"{kind}|{fragment.name}|{fragment.offset}": view
            for fragment in fragments
            for kind, view in fragment.views.items()
        }
        tensors |= {f"{kind}|{rank}|0": state for kind, state in generators.items()}
        # Wide elements first, so that all lie at multiples of their size.
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
        header, ends = {}, [0]
        for key, tensor in ordered:
            ends.append(ends[-1] + tensor.numel() * tensor.element_size())
            header[key] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": ends[-2:],
            }
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # data is aligned to 8 bytes
        encoded = len(encoded).to_bytes(8, "little") + encoded
        return cls(
            header=encoded,
            starts=[len(encoded) + end for end in ends[:-1]],
            tensors=[tensor.detach() for _, tensor in ordered],
            size=len(encoded) + ends[-1],
            kinds={fragment.name: list(fragment.views) for fragment in fragments},
        )

    def copy(self, start: int, out: Tensor) -> None:
        """Fill out (uint8 on the host) with the bytes from start on; waits for the device.

        start and the length of out do not cut elements: multiples of 8, or the end.
        """
        end = start + len(out)
        if start < len(self.header):
            head = as_bytes(self.header[start:end])
            out[: len(head)].copy_(head)
        first = max(0, bisect.bisect_right(self.starts, start) - 1)
        copied = []
        for at, tensor in zip(self.starts[first:], self.tensors[first:]):
            if at >= end:
                break
            width = tensor.element_size()
            low, high = max(start, at), min(end, at + tensor.numel() * width)
            if low < high:
                piece = tensor[(low - at) // width : (high - at) // width]
                out[low - start : high - start].view(tensor.dtype).copy_(piece, non_blocking=True)
                copied.append(piece)
        wait(copied)


def as_bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def wait(copied: list[Tensor]) -> None:
    """Until copies of these to the host have arrived."""
    for device in {tensor.device for tensor in copied}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def aligned(size: int) -> Tensor:
    """uint8 memory for direct I/O."""
    memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + size]


class Streamed:
    """Chunks of an image, copied when they are asked for; valid until AHEAD more were.

    number: of chunks that were asked for.
    """

    ahead: int | None = AHEAD

    def __init__(self, image: Image):
        self.image, self.number = image, 0
        size = min(CHUNK_BYTES, image.size)
        self.ring = [aligned(size) for _ in range(AHEAD)]

    def chunk(self, start: int, end: int) -> memoryview:
        out = self.ring[self.number % AHEAD][: end - start]
        self.number += 1
        self.image.copy(start, out)
        return memoryview(out.numpy())


class HostMemory:
    """Memory that holds an image: allocated once, page-locked where tensors come from a GPU."""

    def __init__(self, image: Image):
        self.bytes = aligned(image.size)
        self.header = image.header
        starts = zip(image.starts, image.tensors)
        # Where each tensor of this header goes; made once, as there may be many thousands.
        self.places = [
            self.bytes[start : start + tensor.nbytes].view(tensor.dtype) for start, tensor in starts
        ]
        pinned = any(tensor.is_cuda for tensor in image.tensors)
        # Registered, as torch's own pinned allocations would be rounded up to a power of two.
        self.registered = pinned and self.register()
        if not self.registered:
            self.bytes.zero_()  # so that the pages exist before the first save

    def holds(self, image: Image) -> bool:
        """Whether this memory was made for images like this one."""
        return self.header == image.header

    def register(self) -> bool:
        code = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), len(self.bytes), 0)
        if int(code) != 0:
            log.warning(
                "train.async_save: %.2f GiB of host memory could not be page-locked (CUDA error "
                "%d): copies are slower; raise the limit of locked memory (ulimit -l)",
                len(self.bytes) / 2**30,
                int(code),
            )
        return int(code) == 0

    def close(self) -> None:
        if self.registered:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
            self.registered = False


class Copied:
    """An image in host memory, as it was when this was made."""

    ahead: int | None = None

    def __init__(self, image: Image, memory: HostMemory):
        self.whole, self.number = memory.bytes, 0
        self.whole[: len(image.header)].copy_(as_bytes(image.header))
        torch._foreach_copy_(memory.places, image.tensors, non_blocking=True)
        wait(image.tensors)

    def chunk(self, start: int, end: int) -> memoryview:
        self.number += 1
        return memoryview(self.whole[start:end].numpy())
