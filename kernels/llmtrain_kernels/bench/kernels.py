"""The kernels that have benchmark cases: the names of the files beside this one."""

KERNELS: tuple[str, ...] = ("adamw", "newton_schulz")
