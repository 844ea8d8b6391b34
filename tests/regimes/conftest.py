"""The small models of tests/test_training.py serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
