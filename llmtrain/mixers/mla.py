"""Multi-head latent attention (MLA): keys and values of all heads are made from one small latent.

    c_t = RMSNorm(W_dkv x_t)                 r_t = rotate(W_kr x_t)        latent [R], shared key
    k_th = [W_uk,h c_t, r_t]                 v_th = W_uv,h c_t             per head h
    q_th = [W_uq,h z_t, rotate(W_qr,h z_t)]  z_t = RMSNorm(W_dq x_t), or x_t without q_lora_rank
    o_th = sum_{j <= t} softmax_j(scale q_th . k_jh) v_jh                  y_t = W_o [o_t1 .. o_tH]

DeepSeek-V2 (arXiv:2405.04434, section 2.1, appendix C), DeepSeek-V3 (arXiv:2412.19437, section
2.1.1). Only a part of each head is rotated, and its key is one for all heads, because a rotation
between W_uk and the query would forbid the absorbed form, by which a step reads the cache:

    q_th . k_jh = (W_uk,h^T q^c_th) . c_j + q^r_th . r_j;    o_th = W_uv,h sum_j p_j c_j

which is multi-query attention with one key [c_j, r_j] and value c_j for all heads; keys and values
of the past are never expanded. Rows of training and prefill use the form above it.

State: R + rope numbers a token for all heads together; the token at position p lies in slot p.
Parameters, H heads of widths nope (N), rope (P) and value (V): D (R + P) + R H (N + V) + H V D,
and D Q + Q H (N + P) with a query rank Q, else D H (N + P). FLOPs a token: 2 per weight, and
2 H (N + P + V) for each key that it sees, on average (T + 1) / 2.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from llmtrain_kernels.attention import (
    BACKENDS,
    Case,
    attention,
    select_backend,
    visible_pairs,
)
from torch import Tensor

from llmtrain.context import SequenceContext
from llmtrain.mixers.base import Mixer, State
from llmtrain.mixers.checks import check_backend
from llmtrain.model.init import depth_std
from llmtrain.model.linear import Linear, cast_parameter
from llmtrain.model.norm import RMSNorm
from llmtrain.model.position import apply_rotary
from llmtrain.model.rope_scaling import yarn_temperature


class LatentAttention(Mixer):
    """head_dim: the unit of the widths below, None for d_model / n_heads.

    q_lora_rank: rank Q of the queries, None for a full projection. kv_lora_rank: width R of the
    latent, None for 4 head_dim. qk_nope_head_dim, v_head_dim: None for head_dim; qk_rope_head_dim:
    None for head_dim / 2, made even (DeepSeek-V2's proportions). norm_eps: of the latents' norms.
    softmax_scale: None for 1 / sqrt(nope + rope). yarn_factor: when positions are scaled by YaRN,
    the scores are multiplied by (0.1 yarn_mscale ln yarn_factor + 1)^2 (position.attention_factor
    is 1 then). backend: as in mixers/attention.py.
    """

    uses_positions = True

    def __init__(
        self,
        d_model: int,
        *,
        layer_idx: int,
        n_layers: int,
        n_heads: int,
        head_dim: int | None = None,
        q_lora_rank: int | None = None,
        kv_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        backend: str = "auto",
        softmax_scale: float | None = None,
        yarn_factor: float | None = None,
        yarn_mscale: float = 1.0,
    ):
        super().__init__()
        check_heads(d_model, n_heads, head_dim)
        unit = d_model // n_heads if head_dim is None else head_dim
        half = max(unit // 4 * 2, 2)
        widths = {
            "q_lora_rank": q_lora_rank,
            "kv_lora_rank": 4 * unit if kv_lora_rank is None else kv_lora_rank,
            "qk_nope_head_dim": unit if qk_nope_head_dim is None else qk_nope_head_dim,
            "qk_rope_head_dim": half if qk_rope_head_dim is None else qk_rope_head_dim,
            "v_head_dim": unit if v_head_dim is None else v_head_dim,
        }
        check_knobs(widths, backend, softmax_scale, yarn_factor, yarn_mscale)
        self.n_heads, self.head_dim, self.backend = n_heads, unit, backend
        self.q_lora_rank, self.kv_lora_rank = q_lora_rank, widths["kv_lora_rank"]
        self.nope, self.rope = widths["qk_nope_head_dim"], widths["qk_rope_head_dim"]
        self.v_head_dim = widths["v_head_dim"]
        self.rotary_width = self.rope
        self.softmax_scale = softmax_scale
        self.scale = (self.nope + self.rope) ** -0.5 if softmax_scale is None else softmax_scale
        if yarn_factor is not None:
            self.scale *= yarn_temperature(yarn_factor, yarn_mscale) ** 2
        queries, d_query = n_heads * (self.nope + self.rope), q_lora_rank or d_model
        self.q_down, self.q_norm = None, None
        if q_lora_rank is not None:
            self.q_down = Linear(d_model, q_lora_rank, init_std=init_std)
            self.q_norm = RMSNorm(q_lora_rank, eps=norm_eps)
        self.q_up = Linear(d_query, queries, init_std=init_std)
        self.kv_down = Linear(d_model, self.kv_lora_rank + self.rope, init_std=init_std)
        self.matrix_splits = {"kv_down.weight": (self.kv_lora_rank, self.rope)}
        self.kv_norm = RMSNorm(self.kv_lora_rank, eps=norm_eps)
        expanded = n_heads * (self.nope + self.v_head_dim)
        self.kv_up = Linear(self.kv_lora_rank, expanded, init_std=init_std)
        out_std = depth_std(init_std, n_layers)
        self.out_proj = Linear(n_heads * self.v_head_dim, d_model, init_std=out_std)

    @property
    def score_width(self) -> int:
        return self.nope + self.rope

    def transfer_scores(self, multiplier: float) -> None:
        self.scale *= multiplier**-0.5 if self.softmax_scale is None else 1 / multiplier

    def forward(
        self, x_BTD: Tensor, ctx: SequenceContext, state: State | None = None
    ) -> tuple[Tensor, State | None]:
        """With a state: prefill. ValueError when it is asked of packed rows or the cache is full.

        All rows of a state have read ctx.prefix_tokens tokens, whose latents are expanded again.
        """
        q_BTHK, latent_BTR = self.project(x_BTD, ctx)
        past = ctx.prefix_tokens
        if state is not None:
            end = self.check_room(ctx, state, tokens=x_BTD.shape[1])
            seen_BSR = state["latent"][:, :past].to(latent_BTR.dtype)
            state["latent"][:, past:end] = latent_BTR.to(state["latent"].dtype)
            latent_BTR = torch.cat([seen_BSR, latent_BTR], dim=1)
        k_BSHK, v_BSHV = self.expand(latent_BTR)
        if state is None or past == 0:
            o_BTHV = attention(
                q_BTHK,
                k_BSHK,
                v_BSHV,
                scale=self.scale,
                doc_ids_BT=ctx.doc_ids_BT,
                cu_seqlens=ctx.cu_seqlens,
                max_seqlen=ctx.max_seqlen if ctx.cu_seqlens is not None else None,
                backend=self.backend,
            )
        else:
            o_BTHV = self.read(q_BTHK, k_BSHK, v_BSHV, ctx)
        return self.out_proj(rearrange(o_BTHV, "b t h v -> b t (h v)")), state

    def step(self, x_BD: Tensor, ctx: SequenceContext, state: State) -> tuple[Tensor, State]:
        """The absorbed form: attention over the latents themselves."""
        x_B1D = x_BD[:, None]
        q_B1HK, latent_B1R = self.project(x_B1D, ctx)
        rows_B1 = torch.arange(x_BD.shape[0], device=x_BD.device)[:, None]
        state["latent"][rows_B1, ctx.positions_BT] = latent_B1R.to(state["latent"].dtype)
        k_BS1R = rearrange(state["latent"].to(x_BD.dtype), "b s r -> b s 1 r")
        weight = cast_parameter(self.kv_up.weight, x_BD)
        up_HVR = rearrange(weight, "(h v) r -> h v r", h=self.n_heads)
        key_HKR, value_HVR = up_HVR.split([self.nope, self.v_head_dim], dim=1)
        plain_B1HK, turned_B1HK = q_B1HK.split([self.nope, self.rope], dim=-1)
        absorbed_B1HR = einsum(plain_B1HK, key_HKR, "b t h k, h k r -> b t h r")
        o_B1HR = self.read(
            torch.cat([absorbed_B1HR, turned_B1HK], dim=-1),
            k_BS1R,
            k_BS1R[..., : self.kv_lora_rank],
            ctx,
        )
        o_B1HV = einsum(o_B1HR, value_HVR, "b t h r, h v r -> b t h v")
        return self.out_proj(rearrange(o_B1HV, "b 1 h v -> b (h v)")), state

    def project(self, x_BTD: Tensor, ctx: SequenceContext) -> tuple[Tensor, Tensor]:
        """q_BTHK, its last `rope` dimensions turned, and [B, T, R + rope], what is cached: the
        normalised latent and the turned shared key."""
        z_BTD = x_BTD if self.q_down is None else self.q_norm(self.q_down(x_BTD))
        q_BTHK = rearrange(self.q_up(z_BTD), "b t (h k) -> b t h k", h=self.n_heads)
        latent_BTR, shared_BTK = self.kv_down(x_BTD).split([self.kv_lora_rank, self.rope], dim=-1)
        if ctx.rotary is not None:
            rotary = ctx.rotary[self.rotary_width]
            shared_BT1K = rearrange(shared_BTK, "b t k -> b t 1 k")
            q_BTHK, shared_BT1K = apply_rotary(q_BTHK, shared_BT1K, rotary, part=self.rope)
            shared_BTK = rearrange(shared_BT1K, "b t 1 k -> b t k")
        return q_BTHK, torch.cat([self.kv_norm(latent_BTR), shared_BTK], dim=-1)

    def expand(self, latent_BSR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every head."""
        latent_BSR, shared_BSK = latent_BSR.split([self.kv_lora_rank, self.rope], dim=-1)
        up_BSHV = rearrange(self.kv_up(latent_BSR), "b s (h v) -> b s h v", h=self.n_heads)
        k_BSHK, v_BSHV = up_BSHV.split([self.nope, self.v_head_dim], dim=-1)
        shared_BSHK = shared_BSK[:, :, None].expand(-1, -1, self.n_heads, -1)
        return torch.cat([k_BSHK, shared_BSHK], dim=-1), v_BSHV

    def read(self, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, ctx: SequenceContext) -> Tensor:
        """o_BTHV over keys in the order of positions; those after a query are empty slots."""
        slots_S = torch.arange(k_BSGK.shape[1], device=k_BSGK.device)
        return attention(
            q_BTHK,
            k_BSGK,
            v_BSGV,
            scale=self.scale,
            q_positions_BT=ctx.positions_BT,
            k_positions_BS=slots_S.expand(k_BSGK.shape[0], -1),
            backend="reference" if self.backend == "reference" else "auto",
        )

    def init_state(
        self, batch: int, *, max_tokens: int, device: torch.device | str, dtype: torch.dtype
    ) -> State:
        """latent: [B, max_tokens, R + rope]."""
        width = self.kv_lora_rank + self.rope
        return {"latent": torch.zeros(batch, max_tokens, width, device=device, dtype=dtype)}

    def cache_slots(self, state: State, positions_BT: Tensor) -> Tensor:
        return positions_BT

    def check_room(self, ctx: SequenceContext, state: State, tokens: int) -> int:
        """The number of tokens after a prefill. ValueError when it does not fit its state."""
        if not ctx.is_dense:
            raise ValueError(
                "mla: got a state together with packed documents, expected one document a row; "
                "make the context with SequenceContext.dense"
            )
        slots, total = state["latent"].shape[1], ctx.prefix_tokens + tokens
        if total > slots:
            raise ValueError(
                f"mla: got {total} tokens for a state of {slots}, expected at most its max_tokens; "
                "make it with a larger init_state(max_tokens=...)"
            )
        return total

    def kernel_backend(
        self, *, device: torch.device, dtype: torch.dtype, tokens: int, documents: bool
    ) -> str:
        case = Case(
            device=device.type,
            capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
            dtype=dtype,
            heads=self.n_heads,
            kv_heads=self.n_heads,
            k_width=self.nope + self.rope,
            v_width=self.v_head_dim,
            documents=documents,
            boundaries=documents,
            training=True,
        )
        return select_backend(case, self.backend).backend

    def flops_per_token(self, tokens: int) -> float:
        """Of the expanded form."""
        projections = [self.q_up, self.kv_down, self.kv_up, self.out_proj]
        if self.q_down is not None:
            projections.append(self.q_down)
        width = self.nope + self.rope + self.v_head_dim
        mixing = 2.0 * self.n_heads * width * visible_pairs(tokens) / tokens
        return sum(linear.flops_per_token() for linear in projections) + mixing

    def state_bytes(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return tokens * (self.kv_lora_rank + self.rope) * dtype.itemsize

    def kept_bytes(self, dtype: torch.dtype, *, compiled: bool) -> float:
        return dtype.itemsize * self.n_heads * (self.nope + self.rope)  # keys, put together


def check_heads(d_model: int, n_heads: int, head_dim: int | None) -> None:
    """ValueError for heads that cannot be made."""
    if n_heads < 1:
        raise ValueError(f"mla: got n_heads={n_heads}, expected at least 1; set mixer.n_heads")
    if head_dim is None and d_model % n_heads:
        raise ValueError(
            f"mla: got d_model={d_model} and n_heads={n_heads}, expected a multiple; set "
            "mixer.head_dim, or change one of the two"
        )


def check_knobs(
    widths: dict[str, int | None],
    backend: str,
    softmax_scale: float | None,
    yarn_factor: float | None,
    yarn_mscale: float,
) -> None:
    """ValueError for knobs that make no heads, or have no effect."""
    for name, width in widths.items():
        if width is not None and width < 1:
            raise ValueError(
                f"mla: got {name}={width}, expected at least 1; set mixer.{name} or mixer.head_dim"
            )
    if widths["qk_rope_head_dim"] % 2:
        raise ValueError(
            f"mla: got qk_rope_head_dim={widths['qk_rope_head_dim']}, expected an even number "
            "(rotation turns pairs); set mixer.qk_rope_head_dim or mixer.head_dim"
        )
    check_backend("mla", backend, BACKENDS)
    if yarn_factor is not None and (yarn_factor < 1 or softmax_scale is not None):
        raise ValueError(
            f"mla: got yarn_factor={yarn_factor} and softmax_scale={softmax_scale}, expected a "
            "factor of at least 1 and no scale, or null; set mixer.yarn_factor"
        )
    if yarn_factor is None and yarn_mscale != 1.0:
        raise ValueError(
            f"mla: got yarn_mscale={yarn_mscale} without yarn_factor, where it has no effect, "
            "expected 1.0; set mixer.yarn_factor or leave it out"
        )
