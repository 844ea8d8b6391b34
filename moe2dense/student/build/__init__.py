"""Build a student layer by layer while its teacher streams, then heal it end to end.

A teacher, a target and some text come in; a dense model goes out, with where each of its neurons comes from.
"""
