"""Training under Slurm: submission, the batch driver on the first node, node check, status, logs.

batch, rank and what they import stay free of torch: they run beside the training.
"""
