"""`python -m longtail_experts`."""

import atexit
import contextlib
import os
import sys

exit_code: int | None = None


@atexit.register  # before all others, so that it is called after them
def end() -> None:
    """At once: to take apart all that was imported, object by object, takes Python 2 to 4 s."""
    if exit_code is None:  # main has not returned
        return
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


try:
    from longtail_experts.cli import main
except KeyboardInterrupt:
    sys.exit(130)

exit_code = main(sys.argv[1:])
