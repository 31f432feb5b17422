"""`make soak`: kills, outages and repetitions in a seeded order, and whether anybody could tell.

    make soak ARGS="--minutes 30 --seed 7"

A node with a small untrained bundle, its own PostgreSQL and an archive for each tenant gets one
study a round, and at random moments of it one or two disturbances. A round is over when nothing
more is to come; the study must have ended as an undisturbed one of its kind does, with each
instance, result and object once. Exit status 1 where one did not.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from db.faults import POINTS, arm
from tests.e2e import disturbed
from tests.e2e.disturbed import KINDS, ORDINARY, Disturbed, Outcome, Study
from tests.e2e.server import Server

#: Of the processes below a supervisor, by what stands in their command lines.
PROCESSES = {
    "scp": ["-m", "scp"],
    "receiver": ["-m", "scp.receiver"],
    "intake": ["-m", "db.drain"],
    "sandbox": ["-m", "db.sandbox"],
    "inference": ["-m", "inference"],
    "deliver": ["-m", "dicom_sr"],
    "dashboard": ["-m", "dashboard"],
}
ROUND_S = 600.0  # a destination that was away is asked again after a quarter of an hour at most
LATEST_S = 8.0  # after a study begins, a disturbance begins


@dataclass
class Tally:
    """What was done, and what came of it."""

    done: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    studies: int = 0
    sent_again: int = 0
    wrongs: list[str] = field(default_factory=list)


class Soak:
    """Rounds of one study each, disturbed by what the seed says."""

    def __init__(self, node: Disturbed, server: Server, seed: int) -> None:
        self.node, self.server = node, server
        self.random = random.Random(seed)
        self.tally = Tally()
        self._expected: dict[str, Outcome] = {}
        self._ways: dict[str, set[str]] = {}  # kind -> the points that it comes through
        self._points = self._shuffled()

    def learn(self) -> None:
        """What an undisturbed study of each kind comes to."""
        for kind in KINDS:
            self.node.forget_passed()
            study = self.node.study(kind)
            self.node.send(study)
            self._expected[kind] = self.node.wait(study)
            self._ways[kind] = self.node.passed()
            self.tally.wrongs += self.node.wrongs(study)

    def round(self) -> None:
        """One study, disturbed."""
        started = time.monotonic()
        actions = [self._point()] if self.random.random() < 0.6 else [self._kill()]
        if self.random.random() < 0.5:
            actions.append(self.random.choice([self._database, self._pacs, self._again])())
        name = actions[0].name
        kinds = [kind for kind in KINDS if name not in ORDINARY or name in self._ways[kind]]
        kind = self.random.choice(kinds)
        study = self.node.study(kind)
        threads = [threading.Thread(target=one.run, args=(study,)) for one in actions]
        for thread in threads:
            thread.start()
        self.node.send(study, ROUND_S)
        for thread in threads:
            thread.join()
        said = self._judge(study)
        self._end_of_points()
        self.tally.studies += 1
        for one in actions:
            self.tally.done[one.what] += 1
        told = "; ".join(str(one) for one in actions)
        print(
            f"{len(self.node.studies):4} {kind:8} {told:60} {'WRONG' if said else 'ok':5}"
            f" {time.monotonic() - started:4.0f} s",
            flush=True,
        )
        self.tally.wrongs += said

    def last_look(self) -> None:
        """At every study again, once a while has passed in which nothing was to happen."""
        time.sleep(10)
        for study in self.node.studies:
            self.tally.wrongs += self._judge(study)
            self.tally.sent_again += self.node.n_sent_again(study)
        self.tally.wrongs += self.node.leftovers()

    def _judge(self, study: Study) -> list[str]:
        try:
            found = self.node.wait(study, ROUND_S)
        except AssertionError:
            return [f"study {study.number} ({study.kind}): it did not end in {ROUND_S:.0f} s"]
        said = self.node.wrongs(study)
        if found != self._expected[study.kind]:
            said.append(f"study {study.number}: {found} is not {self._expected[study.kind]}")
        return said

    # What disturbs.

    def _shuffled(self) -> list[str]:
        names = list(ORDINARY)
        self.random.shuffle(names)
        return names

    def _point(self) -> "Action":
        """Each point once before any comes again."""
        if not self._points:
            self._points = self._shuffled()
        name = self._points.pop()
        passes = self.random.choice([1, 1, 2, 3]) if name in POINTS["receiver"] else 1

        def run(_: Study) -> str:
            arm(self.node.faults, name, passes)
            return f"{ORDINARY[name]} dies at {name}"

        return Action("killed at a named point", name, 0.0, run)

    def _end_of_points(self) -> None:
        left = self.node.armed()
        self.tally.wrongs += [f"{name} was never passed" for name in left]
        self.node.disarm()
        fell = self.node.hospital.node.process.poll() is not None
        if fell:
            self.tally.wrongs.append("the supervisor ended by itself")

    def _kill(self) -> "Action":
        name = self.random.choice([*PROCESSES, "supervisor"])
        pick = self.random.random()

        def run(_: Study) -> str:
            if name == "supervisor":
                self._kill_supervisor()
            else:
                self._kill_child(PROCESSES[name], pick)
            return f"kill -9 {name}"

        return Action(f"kill -9 {name}", name, self._moment(), run)

    def _kill_child(self, words: list[str], pick: float) -> None:
        for _ in range(600):  # it may be on its way up
            top = psutil.Process(self.node.hospital.node.process.pid)
            found = [one for one in top.children(recursive=True) if _is(one, words)]
            if found:
                found[int(pick * len(found))].send_signal(signal.SIGKILL)
                return
            time.sleep(0.1)

    def _kill_supervisor(self) -> None:
        """And start it again at once, while what was below it is still ending."""
        hospital = self.node.hospital
        hospital.node.process.kill()
        hospital.node.stop()
        hospital.start()

    def _database(self) -> "Action":
        away_s = self.random.choice([0.0, 1.0, 5.0, 15.0])

        def run(_: Study) -> str:
            if away_s:
                self.server.stop()
                time.sleep(away_s)
                self.server.start()
                return f"database down {away_s:.0f} s"
            return f"kill -9 of {self.server.kill_backend()}"

        what = "database down" if away_s else "database connection's process killed"
        return Action(what, "database", self._moment(), run)

    def _pacs(self) -> "Action":
        away_s = self.random.choice([1.0, 5.0, 20.0])

        def run(study: Study) -> str:
            with self.node.hospital.archives[study.kind].down():
                time.sleep(away_s)
            return f"PACS down {away_s:.0f} s"

        return Action("PACS down", "pacs", self._moment(), run)

    def _again(self) -> "Action":
        def run(study: Study) -> str:
            self.node.send(study, ROUND_S)
            return "sent twice"

        return Action("study sent twice", "again", self._moment(), run)

    def _moment(self) -> float:
        return self.random.uniform(0.0, LATEST_S)


@dataclass
class Action:
    """A disturbance of one round."""

    what: str
    name: str
    after_s: float
    act: Callable[[Study], str]
    told: str = "not done"

    def run(self, study: Study) -> None:
        time.sleep(self.after_s)
        self.told = self.act(study)

    def __str__(self) -> str:
        return f"{self.told} at {self.after_s:.1f} s" if self.after_s else self.told


def _is(process: psutil.Process, words: list[str]) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return any(command[at : at + len(words)] == words for at in range(len(command)))


def main() -> int:
    given = _arguments()
    if missing := [name for name in ("storescu", "storescp") if not shutil.which(name)]:
        print(f"not installed: {', '.join(missing)} (the package dcmtk)", file=sys.stderr)
        return 2
    folder = given.keep or Path(tempfile.mkdtemp(prefix="vigil-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.nice(5)
    print(
        f"seed {given.seed}; {given.minutes:g} minutes; files and node.log in {folder}", flush=True
    )
    with (
        Server(folder / "server") as server,
        disturbed.running(folder, database_url=server.url) as node,
    ):
        soak = Soak(node, server, given.seed)
        soak.learn()
        deadline = time.monotonic() + 60 * given.minutes
        while time.monotonic() < deadline and soak.tally.studies < given.rounds:
            soak.round()
        soak.last_look()
        tally, instances = soak.tally, sum(len(study.images) for study in node.studies)
    _report(tally, len(node.studies), instances)
    if given.keep is None and not tally.wrongs:
        shutil.rmtree(folder)
    return 1 if tally.wrongs else 0


def _report(tally: Tally, studies: int, instances: int) -> None:
    print(f"\n{'what was done':44} times")
    for what, n in sorted(tally.done.items()):
        print(f"{what:44} {n:5}")
    print(f"\n{studies} studies, {instances} instances")
    print(f"objects that the PACS got again, the same bytes: {tally.sent_again}")
    print(f"differences from undisturbed studies: {len(tally.wrongs)}")
    for one in tally.wrongs:
        print(f"  {one}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000))
    parser.add_argument("--keep", type=Path, help="where to work; kept afterwards")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
