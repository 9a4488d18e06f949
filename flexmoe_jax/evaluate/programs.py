"""Runs generated programs in a separate process, with limits on time, memory and file size.

The limits contain accidents, not malice: run benchmarks that execute code only where nothing can be lost, and only on
request (`--allow-code-execution`).
"""

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from typing import Any

SECONDS, MEMORY_BYTES, FILE_BYTES = 10, 1 << 30, 1 << 20
# The new process sets its own limits: this process has threads, so that none of its code may run between fork and exec.
_LIMITS = f"""import resource
for kind, most in (("CPU", {SECONDS + 1}), ("AS", {MEMORY_BYTES}), ("FSIZE", {FILE_BYTES}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
del resource, kind, most"""


def passes(program: str, seconds: float = SECONDS) -> bool:
    """Whether `program` runs to its end, without an exception, within `seconds` and the other limits.

    A program that exits before its assertions does not pass: after its end a random word is printed, which it cannot
    know.
    """
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, open(os.path.join(folder, "out"), "w+b") as out:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"{_LIMITS}\nexec({program!r}, {{'__name__': '__main__'}})\nprint({word!r})"],
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            ended = process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            _end_group(process)
        out.seek(0)
        return ended and out.read().endswith(f"{word}\n".encode())


def humaneval_program(generated: str, doc: dict[str, Any]) -> str:
    """The HumanEval prompt with the generated body (or the generated whole function), and its test."""
    name = doc["entry_point"]
    whole = f"def {name}(" in generated
    before = doc["prompt"].split(f"def {name}(")[0] if whole else doc["prompt"]
    return f"{before}{generated}\n{doc['test']}\ncheck({name})"


def mbpp_program(generated: str, doc: dict[str, Any]) -> str:
    """The generated MBPP function and its assertions."""
    return "\n".join([doc.get("test_setup_code") or "", generated, *doc["test_list"]])


def _end_group(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()
