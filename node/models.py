"""`vigil models`: which bundles there are, and which version of each serves whom."""

from pathlib import Path
from typing import Annotated

import typer

from node.terminal import AsJson, Config, report

models = typer.Typer(no_args_is_help=True, help="Model bundles.")

Tenants = Annotated[
    list[str] | None,
    typer.Option(
        "--tenant", metavar="ID", help="Only for this tenant; repeatable. Default: all that use it."
    ),
]


@models.command("list")
def models_list(as_json: AsJson = False, config: Config = None) -> None:
    """The versions there are, whom they serve since when, and how shadows compare."""
    from config.settings import load
    from node.models_list import activity, listed, show

    settings = load(config)
    report(listed(settings, activity(settings)), show, as_json=as_json)


@models.command("activate")
def models_activate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME_OR_FOLDER",
            help="A configured bundle, NAME@VERSION installed before, or a new version's folder.",
        ),
    ],
    tenant: Tenants = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A site's own, from `vigil calibrate`, in place of the bundle's.",
        ),
    ] = None,
    accept_moved: Annotated[
        bool,
        typer.Option(
            "--accept-moved-thresholds",
            help="Also where another calibration changes from which raw score studies are called.",
        ),
    ] = False,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Check a version, copy it into the data folder, and let it judge studies from now on.

    A node that runs takes it up within seconds. Nothing is analysed again.
    """
    from node.models_change import activate, show

    changed = activate(name, tenant or (), calibration, config, accept_moved=accept_moved)
    report(changed, show, as_json=as_json)


@models.command("rollback")
def models_rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A configured bundle.")],
    tenant: Tenants = None,
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Go back to the version that was active before; once more leads further back."""
    from node.models_change import roll_back, show

    report(roll_back(name, tenant or (), config), show, as_json=as_json)
