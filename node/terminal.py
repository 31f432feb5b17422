"""What every command shares: its options, its two ways to print, its exit statuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import structlog
import typer
from rich.console import Console

SUCCESS, FAILED, WRONG_USAGE = 0, 1, 2

Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="The configuration; default $VIGIL_CONFIG, else config/vigil.toml.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
TenantOption = Annotated[
    str, typer.Option("--tenant", metavar="ID", help="Only this tenant's studies.")
]


def console() -> Console:
    return Console(highlight=False)


def print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def report(value: Any, show: Callable[[Any, Console], None], *, as_json: bool) -> None:
    """Print for a program or for a person."""
    if as_json:
        print_json(value)
    else:
        show(value, console())


def hush() -> None:
    """No log lines between a command's own words; a stage sets up its own logs afterwards."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


def complain(message: str) -> None:
    """To stderr: stdout belongs to the answer."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="red", markup=False)
