"""`make fuzz`: hostile objects and PDUs to a whole node; every object must have an outcome.

python -m tests.fuzz_node --megabytes 1024 --seed 3
"""

import argparse
import contextlib
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from config.settings import load
from db import embedded
from db.engine import engine_for
from db.tables import AnalysisRow, EventRow, InstanceRow, QuarantineRow, ReturnedRow
from node.running import RunningNode
from tests import fuzz
from tests.raw_peer import Gone, RawPeer, associate_rq, statuses, store_pdus

REAL = Path(__file__).parents[2] / "shared" / "data" / "head-ct-ge"
OBJECTS_AN_ASSOCIATION = 40
_EVERY_PDUS = 4  # a hostile conversation after so many associations
_START_S, _SETTLE_S = 3600.0, 3600.0  # for a machine that is shared with many
_CONFIG = """
[node]
data_dir = "{folder}/var"
min_free_mb = 0
log_level = "DEBUG"
[scp]
port = 0
max_per_minute = 1000000
[dashboard]
port = 0
[[tenants]]
id = "north"
ae_titles = ["NORTH_AI"]
quiet_period_s = 2
max_wait_s = 10
"""


class Senders:
    """What was sent, and what was answered."""

    def __init__(self, port: int, seed: int) -> None:
        self._port = port
        self._rng = random.Random(seed)
        self._cases = fuzz.cases(seed, fuzz.samples(REAL))
        self.n_bytes = self.n_objects = self.n_conversations = 0
        self.answers: Counter[str] = Counter()  # of objects
        self.answered_to_pdus: Counter[str] = Counter()
        self.mutations: Counter[str] = Counter()

    def round(self) -> None:
        """One association of mutated objects, and now and then a conversation of mutated PDUs."""
        contexts = [(fuzz.CT, (syntax,)) for syntax in fuzz.SYNTAXES]
        with RawPeer(self._port) as peer:
            peer.associate(contexts)
            by_syntax = {syntax: number for number, syntax in peer.accepted.items()}
            for _ in range(OBJECTS_AN_ASSOCIATION):
                case = next(self._cases)
                context = by_syntax.get(case.syntax, 1)
                if not self._store(peer, context, case):
                    return
            peer.release()
        if self._rng.randrange(_EVERY_PDUS) == 0:
            self._converse(next(self._cases))

    def _store(self, peer: RawPeer, context: int, case: fuzz.Case) -> bool:
        """Whether the association lives on."""
        self.n_objects += 1
        self.n_bytes += len(case.body)
        self.mutations.update(case.mutations or ("none",))
        try:
            status = peer.store(
                case.sop_class_uid, case.sop_instance_uid, case.body, context=context
            )
        except (Gone, TimeoutError):
            self.answers["aborted"] += 1
            return False
        self.answers[f"0x{status:04X}"] += 1
        return True

    def _converse(self, case: fuzz.Case) -> None:
        """An association's bytes broken somewhere, a third of them before it is accepted."""
        context = (fuzz.CT, (case.syntax,))
        good = b"".join(
            store_pdus(1, case.sop_class_uid, case.sop_instance_uid, case.body[:20_000])
        )
        self.n_conversations += 1
        with RawPeer(self._port, timeout_s=15) as peer:
            if self._rng.randrange(3):
                peer.associate([context])
            else:
                good = associate_rq([context], "NORTH_AI", "CT1") + good
            bad = fuzz.hostile_pdus(self._rng, good)
            self.n_bytes += len(bad)
            with contextlib.suppress(OSError):
                peer.socket.sendall(bad)
                peer.socket.shutdown(socket.SHUT_WR)
            answer = peer.rest()
        for kind, _ in answer:
            self.answered_to_pdus[f"PDU {kind:02X}"] += 1
        for status in statuses(answer):
            self.answered_to_pdus[f"0x{status:04X}"] += 1


class Watch:
    """The node's lasting processes, and their memory over time."""

    def __init__(self, node: RunningNode) -> None:
        self._root = psutil.Process(node.process.pid)
        self.first = self.memory()
        self.middle: dict[str, float] = {}
        self.most: Counter[str] = Counter(self.first)

    def processes(self) -> dict[int, str]:
        """By id: all but the sandboxes' children, which are meant to die, and PostgreSQL's."""
        found = {self._root.pid: "supervisor"}
        for process in self._root.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.cmdline())
                name = next((name for name in _ROLES if name in line), "")
                if name and "db.sandbox" not in line:
                    found[process.pid] = _ROLES[name]
        return found

    def memory(self) -> dict[str, float]:
        """Resident MB by role."""
        found: Counter[str] = Counter()
        for pid, role in self.processes().items():
            with contextlib.suppress(psutil.Error):
                found[role] += psutil.Process(pid).memory_info().rss / 2**20
        return dict(found)

    def look(self) -> None:
        for role, megabytes in self.memory().items():
            self.most[role] = max(self.most[role], megabytes)


_ROLES = {
    "-m scp.receiver": "receiver", "-m db.drain": "intake", "-m scp": "scp",
    "-m inference": "inference", "-m dicom_sr": "deliver", "-m dashboard": "dashboard",
}  # fmt: skip


def outcomes(session: Session, log: Path) -> tuple[dict[str, int], int, int]:
    """Objects by outcome; how many were kept; how many of those have none."""
    kept, duplicates = _ids(log, "instance_kept"), _ids(log, "duplicate_dropped")
    accepted = {str(key) for key in session.scalars(select(InstanceRow.id))}
    aside = {
        str(key): code
        for key, code in session.execute(select(QuarantineRow.id, QuarantineRow.code))
    }
    returned = session.scalar(select(func.sum(ReturnedRow.n))) or 0
    events: Counter[str] = Counter()
    for kind, n in session.execute(select(EventRow.kind, func.count()).group_by(EventRow.kind)):
        events[kind] = n
    found = Counter({f"quarantined: {code}": n for code, n in Counter(aside.values()).items()})
    found["accepted"] = len(accepted)
    found["duplicate"] = len(kept & duplicates)
    found["variant of a stored one"] = events["variant_dropped"]
    found["as one that is set aside already"] = events["instance_came_again"]
    found["our own, returned"] = int(returned)
    found = Counter({name: n for name, n in found.items() if n})
    return dict(sorted(found.items())), len(kept), len(kept) - found.total()


def _ids(log: Path, event: str) -> set[str]:
    return {line["instance_id"] for line in _lines(log) if line.get("event") == event}


def _lines(log: Path) -> Iterator[dict[str, str]]:
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                yield json.loads(line)


def run(megabytes: float, minutes: float, seed: int, folder: Path) -> bool:
    """Send, wait until all is settled, report. Whether everything is as it must be."""
    config = folder / "vigil.toml"
    config.write_text(_CONFIG.format(folder=folder))
    log = folder / "node.log"
    started = time.monotonic()
    try:
        with RunningNode(config, log) as node:
            node.wait_ready(_START_S)
            watch = Watch(node)
            before = watch.processes()
            sender = Senders(node.addresses["scp"][-1][1], seed)
            _send(sender, watch, megabytes, minutes)
            engine = engine_for(load(config), "node")
            is_settled = _settled(engine, folder / "var" / "spool", watch)
            last, after = watch.memory(), watch.processes()
            with Session(engine) as session:
                found, n_kept, n_lost = outcomes(session, log)
                states = _states(session)
            engine.dispose()
    finally:
        embedded.stop(folder / "var")
    crashes = [line for line in _lines(log) if line.get("event") in _CRASHES]
    _print(sender, found, states, watch, last, time.monotonic() - started)
    deaths = len(set(before) - set(after))
    n_answered = sender.answers["0x0000"] + sender.answered_to_pdus["0x0000"]
    print(f"acknowledged {n_answered}, kept {n_kept}, without an outcome {n_lost}")
    print(f"processes that died {deaths}, crashes in the log {len(crashes)}")
    for line in crashes[:5]:
        print(f"  {line}")
    return is_settled and not n_lost and not deaths and not crashes and n_answered <= n_kept


_CRASHES = frozenset({"thread_crashed", "child_ended", "stage_ended", "connection_failed"})


def _send(sender: Senders, watch: Watch, megabytes: float, minutes: float) -> None:
    total = megabytes * 2**20
    started = reported = time.monotonic()
    while sender.n_bytes < total and time.monotonic() - started < 60 * minutes:
        sender.round()
        watch.look()
        share = max(sender.n_bytes / total, (time.monotonic() - started) / 60 / minutes)
        if not watch.middle and share > 0.5:
            watch.middle = watch.memory()
        if time.monotonic() - reported > 30:
            reported = time.monotonic()
            print(f"  {sender.n_bytes / 2**20:.0f} MB, {sender.n_objects} objects", flush=True)


def _settled(engine: Engine, spool: Path, watch: Watch) -> bool:
    """Nothing waits in the spool, and every analysis has ended."""
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        watch.look()
        with Session(engine) as session:
            states = _states(session)
        waiting = sum(states.get(state, 0) for state in ("WAITING", "QUEUED", "FOUND", "BUILT"))
        if not list(spool.rglob("*.dcm")) and not list(spool.rglob("*.part")) and not waiting:
            return True
        time.sleep(2)
    print(
        f"not settled after {_SETTLE_S:.0f} s: {states}, {len(list(spool.rglob('*.dcm')))} spooled"
    )
    return False


def _states(session: Session) -> dict[str, int]:
    query = select(AnalysisRow.state, func.count()).group_by(AnalysisRow.state)
    return {state: n for state, n in session.execute(query)}


def _print(
    sender: Senders,
    found: dict[str, int],
    states: dict[str, int],
    watch: Watch,
    last: dict[str, float],
    took_s: float,
) -> None:
    print(f"sent {sender.n_bytes / 2**20:.0f} MB, {sender.n_objects} objects, ", end="")
    print(f"{sender.n_conversations} conversations of broken PDUs, in {took_s:.0f} s")
    print(f"answers to objects: {dict(sender.answers)}")
    print(f"answers to broken PDUs: {dict(sender.answered_to_pdus)}")
    print(f"mutations: {dict(sender.mutations.most_common())}")
    for name, n in found.items():
        print(f"  {n:7} {name}")
    print(f"analyses: {states}")
    print("resident MB        start  middle     end    most")
    for role in sorted(last):
        row = (watch.first.get(role, 0), watch.middle.get(role, 0), last[role], watch.most[role])
        print(f"  {role:12}" + "".join(f"{value:8.0f}" for value in row))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--minutes", type=float, default=600, help="stop sending after these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="vigil-fuzz-"))
        )
        folder.mkdir(parents=True, exist_ok=True)
        is_good = run(given.megabytes, given.minutes, given.seed, folder.resolve())
    print("as it must be" if is_good else "NOT as it must be")
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
