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
    # transformers' xLSTMForCausalLM of its default configuration, on meta, counts the same
    ("experiment=xlstm_7b",): (6_865_424_896, "NX-AI/xLSTM-7b, safetensors index"),
}


@pytest.mark.parametrize("overrides", PRESETS, ids=" ".join)
def test_parameters_are_those_published(overrides):
    expected, _ = PRESETS[overrides]
    config = compose("train", list(overrides))
    vocab_size = config["model"]["vocab_size"]
    model = build_model(config, vocab_size=vocab_size, device="meta")
    assert parameters_by_part(model)["total"] == expected
