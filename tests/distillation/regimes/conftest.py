"""The small models of tests/test_training.py serve here too."""
