"""Rotary embedding of queries and keys in one launch.

Pair i of a head turns by its token's angle, times the angles' scale s:

    y_a = x_a cos - x_b sin        cos, sin = s cos(t w_i), s sin(t w_i)
    y_b = x_b cos + x_a sin        (a, b) = (i, i + R), or (2 i, 2 i + 1) interleaved

Su et al. 2021, arXiv:2104.09864, eq. 34. Angles come by token, so that packed documents and scaled
frequencies are only other angles. 2 R dimensions of a head are turned, the first of it or of a part
at its end; the others are copied. The inverse, which the backward pass needs, is the same with
-sin. In float32 (float64 stays), rounded once.

Queries and keys are read where they lie, as parts of one packed projection too. Results are new
tensors [B, T, H, K]: with all of a head turned that moves no byte more than turning in place, and
autograd and torch.compile need no copies to keep an overwritten projection apart from its views.

Cost: 2 (H + G) K numbers a token moved, forward and backward, and 2 R float32 angles.
"""

from llmtrain_kernels.rope.op import BACKENDS, cost, rope, select_backend
from llmtrain_kernels.rope.reference import reference

__all__ = ["BACKENDS", "cost", "reference", "rope", "select_backend"]
