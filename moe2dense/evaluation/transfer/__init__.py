"""Measure, expert by expert, what of the teacher is in the student, on held-out tokens."""
