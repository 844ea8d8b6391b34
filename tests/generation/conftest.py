"""The launcher of tests/test_distributed.py serves here too."""
