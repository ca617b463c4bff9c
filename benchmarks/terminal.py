"""Lets a command finish its work, whatever becomes of the terminal or pipe that it prints to."""

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress


class Lenient:
    """A text stream whose failures end the printing, but never the command.

    A character that the stream's encoding lacks is printed as a question mark. After a write has
    failed, as to a closed pipe or a full device, nothing more is written, and `error` says why.
    """

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")  # a closed stdout is None
        self.error: Exception | None = None

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the stream has been closed
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Discard what is still buffered and what comes, or Python fails again as it exits."""
        self.error = self.error or error
        with suppress(OSError, ValueError):  # a stand-in for a stream has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def lenient(command: Callable[..., int | None]) -> Callable[..., int]:
    """Make a command, which returns its exit code or None, independent of where it prints to.

    A reader that closes its pipe, such as `head -1`, has seen enough: the code remains. If stdout
    is lost for another reason, stderr says so and the code is 2.
    """

    @functools.wraps(command)
    def run(*arguments, **options) -> int:
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = out, errors = Lenient(before[0]), Lenient(before[1])
        lost, ended = False, None
        try:
            code = command(*arguments, **options)
        except SystemExit as error:  # --help, or a wrong option
            code, ended = error.code, error
        finally:
            out.flush()
            lost = out.error is not None and not isinstance(out.error, BrokenPipeError)
            if lost:
                print(
                    f"error: stdout: not all could be printed ({out.error}); print to where there "
                    "is space",
                    file=errors,
                )
            errors.flush()
            sys.stdout, sys.stderr = before
        code = code or 2 * lost
        if ended is not None:
            raise SystemExit(code)
        return code

    return run
