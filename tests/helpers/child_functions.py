"""What tests of ao_core.child call in a process."""

import os
import time


def act(request):
    """Doubles a number, or does what a word says."""
    print("this is no answer")  # noqa: T201
    if request == "hang":
        time.sleep(3600)
    if request == "raise":
        raise ValueError("not caught")
    if request == "abort":
        os.abort()
    if request == "who":
        return os.getpid()
    return 2 * request
