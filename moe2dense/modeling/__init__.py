"""Know what holds for any transformers model: its decoder, head, shape and forward pass.

`internals` is the only file that uses what transformers does not promise to keep.
"""
