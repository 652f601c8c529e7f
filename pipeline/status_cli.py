"""What ``electra status --watch`` needs of the command line."""

import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import click

EVERY_S = 10.0
"""Between two looks, unless the user says otherwise."""


class WatchCommand(click.Command):
    """A command whose option ``--watch`` takes a number of seconds or none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Puts the usual number where none follows."""
        if "--watch" in args:
            place = args.index("--watch")
            if not args[place + 1 : place + 2] or not _is_number(args[place + 1]):
                args = [*args[:place], f"--watch={EVERY_S}", *args[place + 1 :]]
        return super().parse_args(ctx, args)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def watch(look: Callable[[], Any], show: Callable[[Any], str], is_over: Callable[[Any], bool], seconds: float) -> None:
    """Shows what there is to see again and again until it is over, or Ctrl-C; a terminal is cleared each time."""
    interrupted = []

    def interrupt(*_: object) -> NoReturn:
        interrupted.append(True)  # a library that catches everything may swallow what is raised
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        while not interrupted:
            found = look()
            if sys.stdout.isatty():
                click.clear()
            click.echo(show(found) + ("" if sys.stdout.isatty() else "\n"))
            if is_over(found):
                return
            time.sleep(seconds)
    except KeyboardInterrupt:
        return
