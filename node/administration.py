"""Sub-commands for administrators: users, database."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from node.terminal import AsJson, Config, console, print_json

users = typer.Typer(no_args_is_help=True, help="Accounts of the dashboard.")
database = typer.Typer(no_args_is_help=True, help="The database, and backups of all.")

UserName = Annotated[str, typer.Argument(metavar="NAME")]


@users.command("add")
def users_add(
    name: UserName,
    role: Annotated[str, typer.Option(help="admin, manager, reader or uploader.")] = "reader",
    tenant: Annotated[str, typer.Option(metavar="ID", help="Required unless admin.")] = "",
    config: Config = None,
) -> None:
    """Add an account and print a one-time link by which its owner sets a password."""
    from sqlalchemy.orm import Session

    from config.settings import load
    from dashboard.users import BadAccount, create_user, login_link
    from node.database import opened

    settings = load(config)
    if tenant and settings.tenant(tenant) is None:
        raise BadAccount(f"the configuration has no tenant {tenant!r}")
    with opened(settings, create=True) as engine, Session(engine) as session, session.begin():
        user = create_user(session, name, role, tenant or None)
        link = login_link(session, user.id, _base_url(config))
    console().print(link, soft_wrap=True)


@users.command("list")
def users_list(as_json: AsJson = False, config: Config = None) -> None:
    """Who may sign in."""
    from sqlalchemy.orm import Session

    from config.settings import load
    from dashboard.users import list_users
    from node.database import opened

    with opened(load(config)) as engine, Session(engine) as session:
        rows = [
            {
                "name": user.name,
                "role": user.role,
                "tenant": user.tenant,
                "has_password": bool(user.password_hash),
                "is_disabled": user.is_disabled,
            }
            for user in list_users(session)
        ]
    if as_json:
        print_json(rows)
        return
    table = Table("name", "role", "tenant", "state")
    for row in rows:
        state = (
            "disabled" if row["is_disabled"] else "" if row["has_password"] else "no password yet"
        )
        table.add_row(str(row["name"]), str(row["role"]), str(row["tenant"] or "all"), state)
    console().print(table)


@users.command("disable")
def users_disable(name: UserName, config: Config = None) -> None:
    """Shut an account; its sessions end at once."""
    from sqlalchemy.orm import Session

    from config.settings import load
    from dashboard.users import disable_user
    from node.database import opened

    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        disable_user(session, name)


@users.command("enable")
def users_enable(name: UserName, config: Config = None) -> None:
    """Open a disabled account again."""
    from sqlalchemy.orm import Session

    from config.settings import load
    from dashboard.users import enable_user
    from node.database import opened

    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        enable_user(session, name)


@users.command("reset")
def users_reset(name: UserName, config: Config = None) -> None:
    """Forget a password, end its sessions, and print a one-time link to set a new one."""
    from sqlalchemy.orm import Session

    from config.settings import load
    from dashboard.users import reset_user
    from node.database import opened

    with opened(load(config)) as engine, Session(engine) as session, session.begin():
        link = reset_user(session, name, _base_url(config))
    console().print(link, soft_wrap=True)


@database.command("upgrade")
def db_upgrade(config: Config = None) -> None:
    """Bring the schema to this version; the node does it by itself at each start."""
    from config.settings import load
    from node.database import opened

    with opened(load(config), create=True):
        console().print("the schema is up to date")


@database.command("backup")
def db_backup(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="New or empty; on another disk than the data.")
    ],
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Copy database, originals, results and what waits into DIR, while the node works.

    The configuration is not part of it: keep the TOML file and the secrets beside it.
    """
    from node.backup import back_up

    raise typer.Exit(back_up(folder, as_json=as_json, config=config))


@database.command("restore")
def db_restore(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="As `vigil db backup` wrote it.", exists=True)
    ],
    as_json: AsJson = False,
    config: Config = None,
) -> None:
    """Read a backup back, on this or a new host: into an empty data folder and database only.

    The node from which it was made must not run any more: both would send.
    """
    from node.backup import restore

    raise typer.Exit(restore(folder, as_json=as_json, config=config))


def _base_url(config: Config) -> str:
    from config.settings import load

    pages = load(config).dashboard
    host = "localhost" if pages.host in ("0.0.0.0", "::", "") else pages.host
    return f"http://{host}:{pages.port}"
