"""Run a program that a model wrote, within limits: started by sandbox.py as a script of its own, and imported by nothing.

python -I -B sandbox_child.py PROGRAM SECONDS BYTES     with a word on stdin, which is printed if the program comes to its end
"""

import os
import resource
import sys

_REFUSED = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
    "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.kill", "os.putenv", "shutil.", "ctypes.", "pty.", "signal.",
    "urllib.", "http.", "ftplib.", "smtplib.", "sqlite3.", "mmap.",
)  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse(event, arguments):
    """Raise PermissionError for what a program that only computes has no need of."""
    if event.startswith(_REFUSED) or (event == "open" and len(arguments) > 2 and (arguments[2] or 0) & _WRITING):
        raise PermissionError(f"{event} is not allowed here")


def main():
    """Set the limits, run the program, and print the word that was on stdin."""
    program, seconds, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    word = sys.stdin.readline()
    with open(program, encoding="utf-8") as file:
        source = file.read()
    limits = {
        resource.RLIMIT_CPU: seconds, resource.RLIMIT_AS: size, resource.RLIMIT_FSIZE: 0, resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 64,
    }  # fmt: skip
    out = os.dup(1)
    os.dup2(2, 1)  # what the program prints is nobody's business
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most))
    sys.argv = [program]
    sys.addaudithook(_refuse)
    exec(compile(source, program, "exec"), {"__name__": "__main__"})
    os.write(out, word.encode())


if __name__ == "__main__":
    main()
