"""How a command ends: in one line where the user can mend or go on, else with a traceback."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import typer

from agent.drivers.driver import DriverError
from selfpruner.stopping import TerminatedError

_HOUSE = Path(__file__).resolve().parents[1]
_ROOMS = ("agent", "evaluators", "prompts", "pruning", "selfpruner")


@contextmanager
def plain_errors(folder: Path | None = None, options: str = "") -> Iterator[None]:
    """Say what a user can mend in one line and exit 2; leave the rest its traceback.

    A ValueError counts as the user's when one of the rooms raised it itself; one from inside a
    library is a defect of ours. A stop by a signal exits 128 plus its number, drivers that gave
    up exit 75 (try again later); both say how to go on where there is a run `folder`, with
    the `options` of the command.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, TerminatedError) else signal.SIGINT
        _stop(f"stopped by {number.name}", 128 + number, folder, options)
    except ValueError as error:
        if not _raised_here(error):
            raise
        _complain(str(error))
        raise typer.Exit(2) from None
    except DriverError as error:
        _stop(" ".join(str(error).split()), 75, folder, options)
    except OSError as error:
        named = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        _complain(" ".join((named or str(error)).split()))
        raise typer.Exit(2) from None


@contextmanager
def faults_told_apart() -> Iterator[None]:
    """Make a ValueError from inside a library a RuntimeError, which no process takes for a user's.

    For workers: raised anew elsewhere, it would no longer tell where it came from.
    """
    try:
        yield
    except ValueError as error:
        if _raised_here(error):
            raise
        raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _stop(message: str, code: int, folder: Path | None, options: str) -> NoReturn:
    """Leave with a line that says how to go on."""
    goes_on = folder is not None and folder.is_dir()
    _complain(f"{message}; `selfpruner resume {folder}{options}` goes on" if goes_on else message)
    raise typer.Exit(code) from None


def _complain(message: str) -> None:
    for line in message.splitlines():
        typer.echo(f"selfpruner: {line}", err=True)


def _raised_here(error: BaseException) -> bool:
    """Return whether the statement that raised `error` lies in one of the rooms."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    file = Path(traceback.tb_frame.f_code.co_filename)
    return any(file.is_relative_to(_HOUSE / room) for room in _ROOMS)
