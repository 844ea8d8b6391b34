"""Train a student on its teacher: one loop, resumable, over stored, streamed or resident targets.

A student, blocks and targets (or a teacher) come in; the trained student, its metrics and checkpoints go out. Regimes
change the text, the targets or the models of the loop. (The function is `moe2dense.distill`.)
"""
