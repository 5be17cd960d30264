"""The same configuration at twice the width, to see what grows: for model.mup_base_width.

With d_model grow model.ffn_hidden and the heads: n_heads and n_kv_heads, whose width stays; or with
model.mup_base_head_dim the width of a head, whose number stays. A knob of a mixer or channel with
such a name grows when its value is the model's, so that a number of its own, in the YAML file or on
the command line (mixer.n_heads=2), stays what it is, and one group of keys stays one.
"""

from __future__ import annotations

# Knob of a part -> keys of the model section that it may be read from.
SOURCES = {
    "n_heads": ("n_heads",),
    "n_kv_heads": ("n_kv_heads", "n_heads"),
    "head_dim": ("head_dim",),
    "hidden": ("ffn_hidden",),
}
HEADS = ("n_heads", "n_kv_heads")


def twice_as_wide(config: dict) -> dict:
    """A copy in which everything that grows with the width is doubled."""
    sizes = config["model"]
    growing = ("head_dim",) if sizes.get("mup_base_head_dim") else HEADS
    wider = dict(config)
    wider["model"] = {
        key: 2 * value if key in ("d_model", "ffn_hidden", *growing) and value else value
        for key, value in sizes.items()
    }
    for group in ("mixer", "channel"):
        wider[group] = doubled(config[group], sizes, growing)
        nodes = config.get(f"{group}s", {})
        wider[f"{group}s"] = {key: doubled(node, sizes, growing) for key, node in nodes.items()}
    return wider


def doubled(node: dict, sizes: dict, growing: tuple[str, ...]) -> dict:
    """A node of a mixer or channel with its growing knobs doubled."""
    knobs = {
        key: value
        for key, value in node.items()
        if key in (*growing, "hidden")
        and value is not None
        and value in [sizes[source] for source in SOURCES[key]]
        and (key, value) != ("n_kv_heads", 1)
    }
    if "n_heads" in knobs and node.get("n_v_heads") is not None:
        knobs["n_v_heads"] = node["n_v_heads"]  # a multiple of it
    return {**node, **{key: 2 * value for key, value in knobs.items()}}


def check_base(sizes: dict) -> None:
    """ValueError for a base that the model's width cannot be compared with."""
    base, head_dim = sizes["mup_base_width"], sizes["mup_base_head_dim"]
    if head_dim is None:
        return
    if base is None:
        raise ValueError(
            f"model.mup_base_head_dim: got {head_dim} with model.mup_base_width=null, where it has "
            "no effect; set model.mup_base_width, or remove it"
        )
    width = sizes["head_dim"] or sizes["d_model"] // sizes["n_heads"]
    if width * base != head_dim * sizes["d_model"]:
        raise ValueError(
            f"model.mup_base_head_dim: got {head_dim} for heads of {width} at model.d_model="
            f"{sizes['d_model']}, expected them to grow as the width does from "
            f"model.mup_base_width={base}, from {width * base / sizes['d_model']:g}; set it to "
            "that, or to null when the number of heads grows instead"
        )
