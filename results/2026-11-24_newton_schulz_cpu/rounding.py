"""Newton-Schulz in 16 bits on Gram matrices: how far from float64, by how steps are grouped.

    python rounding.py          (two minutes on two CPU cores)

Products are summed in float32 and rounded to 16 bits, as tensor cores do; what is symmetric is
rounded once and mirrored. The float64 iteration is given the same matrix, rounded to bfloat16.
"""

import torch

A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
GROUPS = [(5,), (1, 4), (2, 3), (3, 2), (2, 2, 1)]
SHAPES = [(256, 704), (768, 2112)]
BF16, FP16, FP64 = torch.bfloat16, torch.float16, torch.float64


def rounded(x, dtype):
    return x if dtype == FP64 else x.to(dtype).float()


def mirrored(x):
    return x.tril() + x.tril(-1).mT


def definition(x, dtype):
    x = rounded(x / x.norm(), dtype)
    for _ in range(STEPS):
        gram = rounded(mirrored(x @ x.mT), dtype)
        both = rounded(mirrored(C * gram @ gram + B * gram), dtype)
        x = rounded(A * x + both @ x, dtype)
    return x


def on_grams(x, dtype, groups):
    x, one = rounded(x / x.norm(), dtype), torch.eye(len(x))
    for steps in groups:
        r = rounded(mirrored(x @ x.mT), dtype)
        q = one
        for _ in range(steps):
            z = rounded(mirrored(C * r @ r + B * r + A * one), dtype)
            q = rounded(mirrored(q @ z), dtype)
            r = rounded(mirrored(rounded(mirrored(z @ r), dtype) @ z), dtype)
        x = rounded(q @ x, dtype)
    return x


def matrices(rows, cols):
    """Name -> matrix."""
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=FP64)

    found = {
        "Gaussian, columns falling": normal(rows, cols) * torch.arange(1.0, cols + 1).rsqrt(),
        "Gaussian": normal(rows, cols),
    }
    u, v = torch.linalg.qr(normal(rows, rows))[0], torch.linalg.qr(normal(cols, rows))[0]
    for exponent in (1, 2, 3, 5):
        values = torch.logspace(0, -exponent, rows, dtype=FP64)
        found[f"singular values 1 to 1e-{exponent}"] = (u * values) @ v.mT
    found["rank 64, and 1e-3 of noise"] = normal(rows, 64) @ normal(64, cols) + 1e-3 * normal(
        rows, cols
    )
    return found


def main():
    columns = ["definition", *("+".join(map(str, groups)) for groups in GROUPS)]
    titles = [f"{name}, {kind}" for kind in ("bfloat16", "float16") for name in columns]
    for rows, cols in SHAPES:
        print(f"\n| {rows} x {cols} | {' | '.join(titles)} |")
        print("|---" * (1 + len(titles)) + "|")
        for name, matrix in matrices(rows, cols).items():
            given = matrix.to(BF16)
            exact = definition(given.double(), FP64)
            cells = []
            for dtype in (BF16, FP16):
                ways = [definition(given.float(), dtype)]
                ways += [on_grams(given.float(), dtype, groups) for groups in GROUPS]
                cells += [f"{(y.double() - exact).norm() / exact.norm():.1e}" for y in ways]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
