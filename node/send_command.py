"""`vigil send`: the progress bar and the summary round `node.send`."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from node import send
from node.terminal import FAILED, SUCCESS, WRONG_USAGE, complain, console, print_json


def run(folder: Path, *, to: str, called: str, calling: str, as_json: bool) -> int:
    """Send, report, and say by the exit status whether every DICOM file was stored."""
    try:
        peer = send.Peer(*parse_address(to), called=called, calling=calling)
        with send.opened(folder) as source:
            files, passed = send.gather(source)
            if not files:
                complain(f"{folder} holds no DICOM file")
                return WRONG_USAGE
            sent = _send(files, peer, is_quiet=as_json)
    except ValueError as error:
        complain(str(error))
        return WRONG_USAGE
    is_good = all(one.outcome in send.GOOD for one in sent)
    if as_json:
        counts = Counter(one.outcome.value for one in (*passed, *sent))
        print_json(
            {"ok": is_good, "counts": counts, "files": [s.to_json() for s in (*passed, *sent)]}
        )
    else:
        _show(passed, sent, console())
    return SUCCESS if is_good else FAILED


def parse_address(text: str) -> tuple[str, int]:
    """HOST:PORT, [IPV6]:PORT; a lone HOST means port 104."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, "104"
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text} is not HOST:PORT")
    return host, int(port)


def _send(files: Sequence[send.DicomFile], peer: send.Peer, *, is_quiet: bool) -> list[send.Sent]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with nullcontext() if is_quiet else bar:
        task = bar.add_task(f"to {peer.called} at {peer.host}:{peer.port}", total=len(files))
        return send.send(files, peer, lambda _: bar.advance(task))


def _show(passed: Sequence[send.Sent], sent: Sequence[send.Sent], to: Console) -> None:
    for one in (*passed, *sent):
        if one.outcome is not send.Outcome.STORED:
            to.print(f"{one.outcome.value:10} {one.name}: {one.reason}", markup=False)
    counts = Counter(one.outcome.value for one in (*passed, *sent))
    to.print(", ".join(f"{n} {word}" for word, n in counts.items()))
