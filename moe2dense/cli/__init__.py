"""The commands that take paths, one file each; `convert` is pipeline.py and `plan` planning.py."""
