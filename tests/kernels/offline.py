"""Kernels without a GPU: compiled for one that is not there, and run by Triton's interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from llmtrain_kernels.launch import DEFAULT, FOLDER

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Marks tests that run kernels: in the interpreter's process on the CPU, else on a GPU.
runs = pytest.mark.filterwarnings("ignore") if INTERPRETED else pytest.mark.gpu
# Marks tests that run no kernel.
hosts = pytest.mark.skipif(INTERPRETED, reason="nothing that runs a kernel")
# The launch tables: all, and those that were measured on a device.
TABLES = sorted(path.stem for path in FOLDER.glob("*.toml"))
MEASURED = [name for name in TABLES if name != DEFAULT]
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32"}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Of one compiled kernel on compute capability 9.0a. spilled: bytes of local memory a thread;
    wgmma, mma: instructions in its PTX; shared: bytes a program."""

    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma: int
    ptx: str


def compile_for_hopper(
    kernel,
    types: dict[str, str],
    constants: dict[str, object],
    *,
    num_warps: int,
    num_stages: int = 1,
    maxnreg: int | None = None,
    divisible: tuple[str, ...] = (),
) -> Facts:
    """types: Triton's types of the arguments that are not constants ("*bf16", "i32", "fp32");
    divisible: integer arguments that are multiples of 16 where it counts (pointers are always)."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        parameter.name: "constexpr" if parameter.name in constants else types[parameter.name]
        for parameter in kernel.params
    }
    aligned = [
        i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in divisible
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    binary = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    cubin = Path(os.environ.get("TMPDIR", "/tmp")) / f"{os.getpid()}.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    try:
        said = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True).stdout
    finally:
        cubin.unlink()
    ptx = binary.asm["ptx"]
    return Facts(
        registers=int(re.search(r"REG:(\d+)", said).group(1)),
        spilled=int(re.search(r"STACK:(\d+)", said).group(1)),
        shared=binary.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        ptx=ptx,
    )


def run_in_interpreter(file: str, at_least: int) -> None:
    """Run the tests of this file that run kernels once more, on the CPU. at_least: so many must
    pass, so that none is lost silently."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    assert int(re.search(r"(\d+) passed", ran.stdout).group(1)) >= at_least, ran.stdout
