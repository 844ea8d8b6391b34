"""Log-probabilities that others captured: DistillKit's packed targets, read as any targets are, and written for its trainers.

A row holds the token ids of a text and, for each position, the ids and the log-probabilities of the k likeliest next tokens, packed
bit by bit. The set is its own text, so it is both what a student reads and what it learns.
"""
