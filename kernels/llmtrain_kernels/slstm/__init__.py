"""The sLSTM recurrence: scalar memories whose gates read the last output, exponentially gated.

    (z~, i~, f~, o~)_t = x_t + h_{t-1} R                    R block-diagonal: one block a head
    z_t = tanh(z~)    o_t = sigmoid(o~)    log f_t = log sigmoid(f~), or f~ for forget_gate="exp"
    m_t = max(log f_t + m_{t-1}, i~_t)                      the stabiliser
    i_t = exp(i~_t - m_t)    f_t = exp(log f_t + m_{t-1} - m_t)
    c_t = f_t c_{t-1} + i_t z_t    n_t = f_t n_{t-1} + i_t    h_t = o_t c_t / n_t

Beck et al. 2024, arXiv:2405.04517, eq. 8-17. Everything in float32 (float64 stays). The gates see
h_{t-1}, so tokens come one after the other. n_t >= 1 after every token, because of f_t and i_t the
larger one is 1; n = 0 says that there was no token, and then m_t = i~_t.

Cost: 8 H V^2 FLOPs a token (h R). X = 4 V numbers a head are in the order z, i, f, o.
"""

from llmtrain_kernels.slstm.loop import BLOCK, loop
from llmtrain_kernels.slstm.op import BACKENDS, FORGET_GATES, cost, select_backend, slstm
from llmtrain_kernels.slstm.persistent import persistent
from llmtrain_kernels.slstm.reference import reference

__all__ = [
    "BACKENDS",
    "BLOCK",
    "FORGET_GATES",
    "cost",
    "loop",
    "persistent",
    "reference",
    "select_backend",
    "slstm",
]
