"""What the tuner measures of the optimizers' kernels, tried on the CPU."""

import pytest
import torch
from llmtrain_kernels.bench import adamw, newton_schulz
from llmtrain_kernels.launch import tables


@pytest.mark.parametrize("module", [adamw, newton_schulz], ids=lambda m: m.__name__)
def test_candidates_and_tunings(module):
    """They have the keys of the pinned tables, these among them, and run."""
    known = module.candidates()
    tunings = module.tunings(torch.device("cpu"))
    assert {kernel for kernel, _, _ in tunings} == set(known)
    for kernel, candidates in known.items():
        assert 4 <= len(candidates) <= 20
        for device in ("default", "h100"):
            for entry in tables(device)[kernel]:
                keys = entry.keys() - {"up_to"}
                assert all(candidate.keys() == keys for candidate in candidates)
        for entry in tables("h100")[kernel]:
            assert {k: v for k, v in entry.items() if k != "up_to"} in candidates
    for kernel, size, run in tunings:
        assert size > 0
        run(known[kernel][0])
