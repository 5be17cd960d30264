"""What the tuner measures of the optimizers' kernels, tried on the CPU."""

import pytest
import torch
from llmtrain_kernels.bench import adamw, newton_schulz
from llmtrain_kernels.launch import tables
from offline import MEASURED, TABLES


@pytest.mark.parametrize("module", [adamw, newton_schulz], ids=lambda m: m.__name__)
def test_candidates_and_tunings(module):
    """They have the keys of the pinned tables, these among them, and run."""
    known = module.candidates()
    tunings = module.tunings(torch.device("cpu"))
    assert {kernel for kernel, _, _ in tunings} == set(known)
    for kernel, candidates in known.items():
        assert 4 <= len(candidates) <= 20
        for device in TABLES:
            for entry in tables(device)[kernel]:
                pinned = {key: value for key, value in entry.items() if key != "up_to"}
                assert all(candidate.keys() == pinned.keys() for candidate in candidates)
                assert pinned in candidates or device not in MEASURED
    for kernel, size, run in tunings:
        assert size > 0
        run(known[kernel][0])
