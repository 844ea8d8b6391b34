"""Every host in the stacks that serve it: random students, what transformers computes from them, and what each stack does."""
