"""A teacher behind a server that gives log-probabilities: asked once, and stored as any teacher's targets are.

Token ids go out, the likeliest tokens of every position come back. A new kind of server is one class of protocols.py.
"""
