"""The kernels that have benchmark cases: the names of the files beside this one."""

KERNELS: tuple[str, ...] = (
    "adamw",
    "attention",
    "causal_conv",
    "float8",
    "glu",
    "linear_cross_entropy",
    "newton_schulz",
    "norm",
    "rope",
)
