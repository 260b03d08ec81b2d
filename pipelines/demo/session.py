"""Commands that Ctrl-C ends without the stacks that Dagster prints of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from pipelines.local import ROOT


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a module of Python with its arguments in a session of its own; returns its exit status.

    So signals reach it through this process alone, which first stops listening to what it has to say.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # A shell's background jobs ignore the first one.
        signal.signal(number, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stderr  # noqa: S101 For the type checker.
    try:
        while chunk := os.read(process.stderr.fileno(), 65536):
            os.write(2, chunk)
        return process.wait()
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGINT)
        process.communicate()
        raise
