"""Run every ```bash and ```python block of a Markdown file in order, in a scratch copy of the checkout.

Blocks share the folder, so a later one can use what an earlier one made. Other fences (text, toml) are only shown.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def main(file: str) -> int:
    blocks = BLOCK.findall((ROOT / file).read_text(encoding="utf-8"))
    environment = os.environ | {"PATH": f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkout"
        shutil.copytree(
            ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "out", "__pycache__"), symlinks=True
        )
        for number, (language, code) in enumerate(blocks, 1):
            command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
            start = time.perf_counter()
            done = subprocess.run(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
            )
            good = done.returncode == 0
            failed += not good
            print(
                f"{file} block {number} ({language}): {'ok' if good else 'FAILED'} in {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            if not good:
                print(code, done.stdout[-3000:], done.stderr[-3000:], sep="\n--\n")
    print(f"{len(blocks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
