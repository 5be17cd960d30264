"""How far bfloat16 activations are from float64, and what gates do at their extremes.

    python scripts/numerics.py [--device cuda] [--only mamba2 mlstm] [--json numerics.json]

errors: each mixer of configs/mixer at d_model 128 with 4 heads, a row of noise (rounded to bfloat16
first, so that both read the same numbers). Truth is the token loop (backend=reference) in float64
at the short length; at the long one, the chunked form in float64, which continues from a state
every 512 tokens and is first held against the loop. Errors are ||low - exact|| / ||exact||.
gates: each operation with gates fixed at a value, 4096 tokens of bfloat16 noise: the largest number
in its state and the size of its output at the end, and whether all gradients are finite.

The tables go into docs/numerics.md between their markers, all numbers into --json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from llmtrain.build import part, target
from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer
from llmtrain.model.init import initialise
from llmtrain.model.position import Rope

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "numerics.md"
WIDTH, HEADS, PIECE, END = 128, 4, 512, 1024
# The same mechanism under another name, with nothing to add here.
ALIASES = ("mha", "mqa")
# Further lines of the table of errors: name -> (YAML, knobs).
VARIANTS = {
    "gated_deltanet, eigenvalues in [-1, 1]": ("gated_deltanet", {"allow_neg_eigval": True}),
    "mlstm, input_gate_bias 0": ("mlstm", {"input_gate_bias": 0.0}),
}


def node(name: str, **changes: object) -> dict:
    """A mixer's YAML, or a variant's, with the sizes of this script."""
    name, knobs = VARIANTS.get(name, (name, {}))
    sizes = {"d_model": WIDTH, "n_heads": HEADS, "n_kv_heads": HEADS, "init_std": WIDTH**-0.5}
    model = OmegaConf.merge(OmegaConf.load(ROOT / "configs/model/tiny.yaml"), sizes)
    config = OmegaConf.create({"model": model})
    config.mixer = OmegaConf.load(ROOT / f"configs/mixer/{name}.yaml")
    return {**OmegaConf.to_container(config, resolve=True)["mixer"], **knobs, **changes}


def build(name: str, dtype: torch.dtype, device: torch.device, **changes: object) -> Mixer:
    """The mixer as it is trained (parameters float32), or all of it in float64."""
    mixer = part(node(name, **changes), f"mixer={name}", WIDTH, layer_idx=0, n_layers=1)
    initialise(mixer, 0)
    return mixer.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def context(mixer: Mixer, tokens: int, device: torch.device, prefix: int = 0) -> SequenceContext:
    ctx = SequenceContext.dense(1, tokens, device=device, prefix_tokens=prefix)
    if not mixer.uses_positions:
        return ctx
    width = mixer.rotary_width
    rope = Rope(WIDTH, max_seq_len=prefix + tokens, rotary_widths=(width,)).to(device)
    return ctx.with_rotary(rope.rotary(ctx))


def noise(tokens: int, seed: int, device: torch.device) -> Tensor:
    """float64 [1, tokens, WIDTH] whose numbers bfloat16 holds exactly."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, WIDTH, generator=draw).bfloat16().double().to(device)


def relative(low: Tensor, exact: Tensor) -> float:
    return float((low.double() - exact).norm() / exact.norm())


@torch.no_grad()
def in_pieces(mixer: Mixer, x_BTD: Tensor) -> Tensor:
    """The row PIECE tokens at a time, each continuing the state: needs no [T, T] anywhere."""
    tokens, device = x_BTD.shape[1], x_BTD.device
    state = mixer.init_state(1, max_tokens=tokens, device=device, dtype=x_BTD.dtype)
    outputs = []
    for start in range(0, tokens, PIECE):
        piece_BTD = x_BTD[:, start : start + PIECE]
        ctx = context(mixer, piece_BTD.shape[1], device, prefix=start)
        y_BTD, state = mixer(piece_BTD, ctx, state)
        outputs.append(y_BTD)
    return torch.cat(outputs, dim=1)


def gradient(mixer: Mixer, x_BTD: Tensor, weights_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and d sum(weights * output) / d x."""
    x_BTD = x_BTD.detach().requires_grad_()
    y_BTD, _ = mixer(x_BTD, context(mixer, x_BTD.shape[1], x_BTD.device))
    (grad_BTD,) = torch.autograd.grad((y_BTD * weights_BTD.to(y_BTD.dtype)).sum(), x_BTD)
    return y_BTD.detach(), grad_BTD


def errors(name: str, short: int, long: int, device: torch.device) -> dict:
    """One line of the table of errors."""
    has_loop = "backend" in node(name)
    loop = {"backend": "reference"} if has_loop else {}
    truth = build(name, torch.float64, device, **loop)
    exact, low = (build(name, dtype, device) for dtype in (torch.float64, torch.bfloat16))
    low_loop = build(name, torch.bfloat16, device, **loop)
    x_BTD, weights_BTD = noise(short, 0, device), noise(short, 1, device)
    y_BTD, grad_BTD = gradient(truth, x_BTD, weights_BTD)
    low_y_BTD, low_grad_BTD = gradient(low, x_BTD.bfloat16(), weights_BTD)
    with torch.no_grad():
        loop_y_BTD, _ = low_loop(x_BTD.bfloat16(), context(low_loop, short, device))
    pieces_BTD = in_pieces(exact, x_BTD)
    row = {
        "mixer": name,
        "short": short,
        "row": relative(low_y_BTD, y_BTD),
        "end": relative(low_y_BTD[:, -END:], y_BTD[:, -END:]),
        "gradient": relative(low_grad_BTD, grad_BTD),
        "row_bf16_loop": relative(loop_y_BTD, y_BTD),
        "chunked_float64": relative(pieces_BTD, y_BTD),
    }
    if long > short:
        x_BTD = noise(long, 2, device)
        y_BTD = in_pieces(exact, x_BTD)
        # On a CPU attention takes memory for [T, T] scores where keys and values differ in width.
        if device.type == "cpu" and low.uses_positions:
            low_y_BTD = in_pieces(low, x_BTD.bfloat16())
        else:
            with torch.no_grad():
                low_y_BTD, _ = low(x_BTD.bfloat16(), context(low, long, device))
        row |= {
            "long": long,
            "long_row": relative(low_y_BTD, y_BTD),
            "long_end": relative(low_y_BTD[:, -END:], y_BTD[:, -END:]),
            "long_finite": bool(low_y_BTD.isfinite().all()),
        }
    return row


def errors_table(rows: list[dict], short: int, long: int) -> str:
    head = ["mixer", f"output, {short}", f"last {END}", "input gradient", "token loop in bf16"]
    head += [f"output, {long}", f"last {END}", "float64: pieces against loop"]
    keys = ["row", "end", "gradient", "row_bf16_loop", "long_row", "long_end", "chunked_float64"]
    lines = [[r["mixer"], *(f"{r[k]:.1e}" for k in keys if k in r)] for r in rows]
    return table(head, lines)


def table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Gates:
    """Each operation with gates held at a value; K = V = 32, 4 heads, bfloat16 inputs."""

    def __init__(self, tokens: int, device: torch.device):
        self.tokens, self.device = tokens, device

    def noise(self, *shape: int, seed: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(1, self.tokens, *shape, generator=draw).to(self.device)

    def qkv(self, heads: int = 4, width: int = 32) -> list[Tensor]:
        """Queries and keys of norm 1, values of size 1."""
        q, k, v = (self.noise(heads, width, seed=seed) for seed in range(3))
        inputs = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)
        return [x.bfloat16().requires_grad_() for x in inputs]

    def held(self, value: float, *shape: int) -> Tensor:
        gate = torch.full((1, self.tokens, *shape), value, device=self.device)
        return gate.requires_grad_()

    def scalar_decay(self, g: float) -> tuple:
        from llmtrain_kernels.scalar_decay import scalar_decay

        inputs = [*self.qkv(), self.held(g, 4)]
        return *scalar_decay(*inputs, return_state=True), inputs

    def gated_delta_rule(self, g: float, beta: float) -> tuple:
        from llmtrain_kernels.delta_rule import gated_delta_rule

        inputs = [*self.qkv(), self.held(g, 4), self.held(beta, 4)]
        return *gated_delta_rule(*inputs, return_state=True), inputs

    def mlstm(self, i: float, f: float) -> tuple:
        from llmtrain_kernels.mlstm import mlstm

        inputs = [*self.qkv(), self.held(i, 4), self.held(f, 4)]
        out, state = mlstm(*inputs, return_state=True)
        return out, state[0], inputs

    def slstm(self, i: float, f: float) -> tuple:
        from llmtrain_kernels.slstm import slstm

        z, o = (self.noise(4, 32, seed=seed) for seed in (3, 4))
        gates = [torch.full_like(z, value) for value in (i, f)]
        x = torch.cat([z, *gates, o], dim=-1).requires_grad_()
        draw = torch.Generator().manual_seed(5)
        r = (torch.randn(4, 32, 128, generator=draw) / 32).to(self.device).requires_grad_()
        out, state = slstm(x, r, return_state=True)
        return out, state[1], [x, r]

    def selective_scan(self, delta: float) -> tuple:
        from llmtrain_kernels.selective_scan import selective_scan

        u = self.noise(64, seed=6).bfloat16().requires_grad_()
        b, c = (self.noise(1, 16, seed=s).bfloat16().requires_grad_() for s in (7, 8))
        a = -torch.arange(1.0, 17.0, device=self.device).expand(64, 16).clone()
        skip = torch.ones(64, device=self.device)
        held = self.held(delta, 64)
        return *selective_scan(u, held, a, b, c, skip, return_state=True), [u, held, b, c]


HUGE = 3e38
CASES: tuple[tuple[str, tuple[float, ...], str], ...] = (
    ("scalar_decay", (0.0,), "g = 0: nothing is forgotten"),
    ("scalar_decay", (-1e-3,), "g = -0.001"),
    ("scalar_decay", (-30.0,), "g = -30: one token is left"),
    ("scalar_decay", (-HUGE,), "g = -3e38: only the token itself"),
    ("gated_delta_rule", (0.0, 0.0), "g = 0, beta = 0: nothing is written"),
    ("gated_delta_rule", (0.0, 1.0), "g = 0, beta = 1: a key's value is replaced"),
    ("gated_delta_rule", (0.0, 2.0), "g = 0, beta = 2: a reflection, nothing is forgotten"),
    ("gated_delta_rule", (-HUGE, 1.0), "g = -3e38, beta = 1: only the token itself"),
    ("mlstm", (0.0, 0.0), "i = 0, f = 0"),
    ("mlstm", (100.0, 100.0), "i = 100, f = 100: all tokens weigh the same"),
    ("mlstm", (HUGE, HUGE), "i = 3e38, f = 3e38"),
    ("mlstm", (-HUGE, HUGE), "i = -3e38, f = 3e38: nothing is written"),
    ("mlstm", (HUGE, -HUGE), "i = 3e38, f = -3e38: only the token itself"),
    ("mlstm", (-HUGE, -HUGE), "i = -3e38, f = -3e38"),
    ("slstm", (0.0, 0.0), "i = 0, f = 0"),
    ("slstm", (HUGE, HUGE), "i = 3e38, f = 3e38: all tokens weigh the same"),
    ("slstm", (-HUGE, HUGE), "i = -3e38, f = 3e38: all tokens weigh the same"),
    ("slstm", (HUGE, -HUGE), "i = 3e38, f = -3e38: only the token itself"),
    ("slstm", (-HUGE, -HUGE), "i = -3e38, f = -3e38"),
    ("selective_scan", (0.0,), "delta = 0: nothing is written or forgotten"),
    ("selective_scan", (1e-3,), "delta = 0.001"),
    ("selective_scan", (100.0,), "delta = 100: only the token itself"),
)


def gate_row(op: str, values: tuple[float, ...], what: str, gates: Gates) -> dict:
    """One line of the table of gates."""
    run: Callable[..., tuple] = getattr(gates, op)
    out, state, inputs = run(*values)
    grads = torch.autograd.grad(out.float().sum(), inputs, allow_unused=True)
    tensors = [out, state, *(grad for grad in grads if grad is not None)]
    return {
        "op": op,
        "values": list(values),
        "gates": what,
        "largest_state": float(state.detach().abs().max()),
        "output": float(out.detach()[:, -256:].double().square().mean().sqrt()),
        "finite": all(bool(tensor.isfinite().all()) for tensor in tensors),
    }


def gates_table(rows: list[dict]) -> str:
    head = ["operation", "gates", "largest number of the state", "output (root mean square)"]
    head.append("all finite, gradients too")
    lines = [
        [
            f"`{r['op']}`",
            r["gates"],
            f"{r['largest_state']:.3g}",
            f"{r['output']:.3g}",
            "yes" if r["finite"] else "**no**",
        ]
        for r in rows
    ]
    return table(head, lines)


def put(text: str, marker: str, content: str) -> str:
    """The document with the content between <!-- marker --> and <!-- /marker -->."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{DOCUMENT.name}: got no {begin} ... {end}, expected both; add them")
    return f"{before}{begin}\n{content}\n{end}{after}"


def names(only: list[str] | None) -> list[str]:
    """Causal mixers of configs/mixer, aliases left out unless asked for."""
    if only:
        return only
    found = sorted(path.stem for path in (ROOT / "configs/mixer").glob("*.yaml"))
    kept = [name for name in found if name not in ALIASES]
    causal = [name for name in kept if target(node(name), f"mixer={name}").causal]
    return sorted([*causal, *VARIANTS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="+", help="mixers; default: all of configs/mixer")
    parser.add_argument("--short", type=int, default=2048)
    parser.add_argument("--long", type=int, default=32768)
    parser.add_argument("--gate-tokens", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("highest")
    rows = []
    for name in names(options.only):
        began = time.perf_counter()
        rows.append(errors(name, options.short, options.long, device))
        print(f"{name} {time.perf_counter() - began:.0f} s", json.dumps(rows[-1]), flush=True)
    gates = Gates(options.gate_tokens, device)
    gate_rows = [gate_row(*case, gates) for case in CASES]
    tables = {
        "errors": errors_table(rows, options.short, options.long),
        "gates": gates_table(gate_rows),
    }
    text = options.document.read_text(encoding="utf-8")
    for marker, content in tables.items():
        text = put(text, marker, content)
        print(content, flush=True)
    options.document.write_text(text, encoding="utf-8")
    if options.json is not None:
        on_gpu = device.type == "cuda"
        facts = {
            "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
            "torch": torch.__version__,
            "errors": rows,
            "gates": gate_rows,
        }
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if not all(row["finite"] for row in gate_rows):
        sys.exit("some number is not finite: see the table of gates")


if __name__ == "__main__":
    main()
