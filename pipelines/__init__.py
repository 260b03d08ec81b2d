"""When the statistics are computed, and with what. Start reading at `pipelines.definitions`."""

import sys
from typing import Any


def _without_a_stack(kind: Any, error: Any, stack: Any) -> None:
    """Ctrl-C is no error of the program, wherever it was just then: in its imports, too."""
    if issubclass(kind, KeyboardInterrupt):
        print("Interrupted.", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, stack)


sys.excepthook = _without_a_stack
