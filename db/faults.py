"""Points at which a test lets this process die, to prove that every line may be the last.

Nothing but a call that does nothing, unless $VIGIL_FAULTS names a folder when the process starts.
There a test arms a point while the node runs, and each arming kills one process, once:

    <folder>/armed/<point>.<n>   n more passes through the point, then one process dies there
    <folder>/passed/<point>      some process has come through
"""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

VARIABLE = "VIGIL_FAULTS"

#: Every point, by process, and what has just happened there.
POINTS: Mapping[str, Mapping[str, str]] = {
    "receiver": {
        "spool_begun": "a .part file holds its head",
        "spool_written": "all bytes are written, none is synced",
        "spool_synced": "the .part file is synced",
        "spool_renamed": "it is called .dcm, its folder is not synced",
        "store_kept": "it is durable, and not answered yet",
    },
    "intake": {
        "intake_filed": "rows are written, not committed",
        "intake_rows_committed": "rows are committed, files still lie in the spool",
        "intake_linked": "files are in the store, their folders not synced",
        "intake_synced": "their folders are synced",
        "intake_stored": "stored_at is set, the spool still has the files",
        "intake_unlinked": "the spool is empty",
    },
    "sandbox": {
        "describe_begun": "a child is about to read a header",
        "decode_begun": "a child is about to decode an image",
    },
    "inference": {
        "readiness_moved": "the images are chosen, not committed",
        "readiness_committed": "the study is queued",
        "infer_claimed": "the claim is committed, nothing is done",
        "infer_loaded": "the images are decoded",
        "infer_scored": "a batch is scored",
        "maps_written": "the heat maps lie on the disk, nothing is stored",
        "finding_stored": "the result's rows are written, not committed",
        "finding_committed": "the result is committed",
    },
    "deliver": {
        "build_claimed": "the claim is committed, nothing is built",
        "object_written": "one object's file is written and synced",
        "objects_recorded": "the objects have rows",
        "build_concluded": "the deliveries are owed, not committed",
        "build_committed": "the deliveries are owed",
        "delivery_claimed": "the claim is committed, nothing is sent",
        "object_to_send": "one object is read and about to be sent",
        "object_sent": "the peer has answered, nothing is written down",
        "object_noted": "the answer is written down",
        "delivery_concluded": "the delivery's end is written, not committed",
        "delivery_committed": "the delivery is over",
        "notice_drawn": "a page AI NOT PROCESSED has its row, no object",
    },
    "commitment": {  # in whichever process: only where somebody asks for it
        "commitment_kept": "a message is durable, and not answered yet",
        "commitment_taken": "what it says is committed, the spool still has it",
        "commitment_claimed": "a transaction UID is drawn, nobody is asked",
        "commitment_asked": "the destination has answered, nothing is written down",
        "pledge_reported": "the sender has its answer, nothing is written down",
    },
    "operator": {  # `vigil quarantine release`: nobody comes through in an ordinary run
        "release_linked": "files have their new names, rows are not committed",
        "release_committed": "rows are committed, old names are left",
    },
}


def _nothing(name: str) -> None:
    """In production."""


def _dying_in(folder: Path) -> Callable[[str], None]:
    armed, passed = folder / "armed", folder / "passed"

    def pass_or_die(name: str) -> None:
        if (passed / name).parent.is_dir():
            (passed / name).touch()
        left = sorted(armed.glob(f"{name}.*"), key=lambda path: int(path.suffix[1:]))
        if not left:
            return
        try:
            left[-1].unlink()  # whoever removes it has had this pass: threads and processes race
        except FileNotFoundError:
            return
        if left[-1].suffix == ".1":
            os.kill(os.getpid(), signal.SIGKILL)

    return pass_or_die


def arm(folder: Path, name: str, passes: int = 1) -> None:
    """Let whoever comes through `name` as the `passes`-th die there."""
    for number in range(1, passes + 1):
        (folder / "armed" / f"{name}.{number}").touch()


point: Callable[[str], None] = (
    _dying_in(Path(os.environ[VARIABLE])) if os.environ.get(VARIABLE) else _nothing
)
