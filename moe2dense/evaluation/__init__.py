"""Compare a model with its teacher on held-out text.

Blocks and a teacher (or what was kept of it) come in; divergence, likelihood and agreement with intervals go out, beside
baselines, a judge, samples of writing, public tasks, and what became of each expert (`transfer`).
"""
