"""Published models: the preset builds on meta and has as many parameters as was published."""

import pytest

from llmtrain.accounting import parameters_by_part
from llmtrain.build import build_model
from llmtrain.config import compose

# overrides -> (parameters, where the number comes from). Exact, vocabulary as published.
PRESETS = {
    ("model=llama3_8b",): (8_030_261_248, "meta-llama/Meta-Llama-3-8B, safetensors index"),
    ("model=llama3_70b",): (70_553_706_496, "meta-llama/Meta-Llama-3-70B, safetensors index"),
    # transformers' DeepseekV3ForCausalLM of the published configuration, on meta; with the
    # 58 x 256 biases of its routers, buffers here and there, the released 671,026,419,200
    ("experiment=deepseek_v3", "objective=causal"): (671_026_404_352, "arXiv:2412.19437, 671B"),
    ("experiment=deepseek_v3_mini",): (1_168_340_736, "none: ours, 56,465,152 in the mtp module"),
    # also transformers' MixtralForCausalLM of the published configuration, on meta
    ("experiment=mixtral_8x7b",): (46_702_792_704, "mistralai/Mixtral-8x7B-v0.1, 46.7B"),
    # also transformers' JambaForCausalLM of its default configuration, on meta
    ("experiment=jamba",): (51_570_323_328, "ai21labs/Jamba-v0.1, 52B in arXiv:2403.19887"),
    # its authors' implementation has 288 more: a bias of beta and one number a head without effect
    ("experiment=gated_deltanet_1_3b",): (1_309_295_488, "1.3B in arXiv:2412.06464, 16 layers"),
    # also transformers' Qwen3NextForCausalLM of the published configuration, on meta
    ("experiment=qwen3_next_80b_a3b",): (79_674_391_296, "Qwen/Qwen3-Next-80B-A3B, without MTP"),
    # transformers' xLSTMForCausalLM of its default configuration, which is NX-AI/xLSTM-7b's, on
    # meta, counts the same: tests/export/test_xlstm.py
    ("experiment=xlstm_7b",): (6_865_424_896, "arXiv:2503.13427, 7B"),
    # transformers' Mamba2ForCausalLM of the published configurations, on meta, counts the same:
    # vocabulary of 50277, in rows a multiple of 16
    ("experiment=mamba2_370m",): (368_346_624, "state-spaces/mamba2-370m"),
    ("experiment=mamba2_2_7b",): (2_702_599_680, "state-spaces/mamba2-2.7b"),
    ("experiment=mamba2_8b",): (8_236_999_680, "arXiv:2406.07887, 8B"),
    # its authors' configuration by hand: an embedding of 65536 x 5280, 8 layers of 4 D^2 + 2 D
    # (biases of queries and keys) + 3 D F + 4 D, the adapter's 2 D^2 and one norm. Their own
    # comment, 3,509,051,040, leaves out the adapter and the norms of the layers; the released file
    # holds the embedding twice, 3,911,006,880
    ("experiment=huginn_3_5b",): (3_564_976_800, "tomg-group-umd/huginn-0125, 3.5B"),
    # its authors' configuration Samba_1.3B by hand: nine layers of Mamba (33,431,040 each), nine of
    # attention (4 D^2), 18 of SwiGLU (3 D F), 37 norms, a tied embedding of 32000 rows
    ("experiment=samba",): (1_330_207_488, "microsoft/Samba, 1.3B in arXiv:2406.07522"),
    # transformers' ZambaForCausalLM of its default configuration, on meta, counts the same
    ("experiment=zamba_7b",): (7_232_490_496, "Zyphra/Zamba-7B-v1, 7B in arXiv:2405.16712"),
}


@pytest.mark.parametrize("overrides", PRESETS, ids=" ".join)
def test_parameters_are_those_published(overrides):
    expected, _ = PRESETS[overrides]
    config = compose("train", list(overrides))
    vocab_size = config["model"]["vocab_size"]
    model = build_model(config, vocab_size=vocab_size, device="meta")
    assert parameters_by_part(model)["total"] == expected
