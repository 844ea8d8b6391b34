"""Optimisers that hold little, and what else makes fitting a whole model take less memory: shared by the build's heal and by training."""
