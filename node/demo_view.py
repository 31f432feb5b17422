"""What a newcomer sees of the demo: what happens in each step, and the studies as they travel."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from node.hospital import Visit

COLOURS = {"STAT": "bold red", "URGENT": "bold yellow", "ROUTINE": "green"}
# What a state means to somebody who has never seen it.
WORDS = {
    "WAITING": "waits until the series is whole",
    "QUEUED": "the model looks at it",
    "FOUND": "report and pictures are made",
    "BUILT": "is sent to the PACS",
    "DELIVERED": "delivered",
    "DELIVERED_IN_PART": "delivered in part",
    "NOT_ANALYSED": "not analysed",
    "FAILED": "failed",
}
KINDS = {"SR": "report", "summary": "summary", "overlay": "overlay", "KO": "key image note"}


class View:
    """The terminal, or nothing at all where stdout belongs to a JSON document."""

    def __init__(self, *, is_silent: bool) -> None:
        self._console = Console(highlight=False, quiet=is_silent)
        self._is_animated = self._console.is_terminal and not is_silent

    def welcome(self, folder: Path) -> None:
        self._console.print(
            Panel(
                "Two hospitals, [bold]north[/] and [bold]south[/], share one Vigil node on this "
                "machine.\nTheir scanners send studies whose truth is known; the node answers with "
                "DICOM reports and pictures in each hospital's own archive, or with the reason why "
                f"not.\n[dim]Everything lives in {folder}. Research software.[/]",
                title="[bold]Vigil demo[/]",
                border_style="cyan",
            )
        )

    def step(self, words: str) -> None:
        self._console.print(f"[green]✓[/] {words}")

    @contextmanager
    def busy(self, words: str) -> Iterator[None]:
        if not self._is_animated:
            self._console.print(f"[dim]…[/] {words}")
            yield
            return
        with self._console.status(words):
            yield

    def dashboard(self, link: str) -> None:
        self._console.print(
            f"[green]✓[/] Watch it live (the link signs you in, once):\n  [bold cyan]{link}[/]",
            soft_wrap=True,
        )

    @contextmanager
    def table(self, visits: Sequence[Visit]) -> Iterator[Callable[[], None]]:
        """A live table of the studies; call what is yielded after each change."""
        self._console.print("[green]✓[/] The scanners send their studies by C-STORE:")
        if not self._is_animated:
            settled: set[int] = set()
            yield lambda: self._tell(visits, settled)
            return
        with Live(_progress(visits), console=self._console, transient=True) as live:
            yield lambda: live.update(_progress(visits))

    def _tell(self, visits: Sequence[Visit], settled: set[int]) -> None:
        """One line for each study that has just reached its outcome: a pipe cannot be redrawn."""
        for number, visit in enumerate(visits):
            if visit.outcome and number not in settled:
                settled.add(number)
                self._console.print(
                    f"  {visit.tenant} {visit.patient}: {WORDS[visit.facts['state']]}"
                )

    def summary(self, visits: Sequence[Visit], document: dict[str, Any]) -> None:
        self._console.print(Group(_results(visits), *_remarks(visits)))
        strays = document["objects_in_a_wrong_pacs"]
        good = sum(visit.is_as_expected for visit in visits)
        colour = "green" if document["ok"] else "red"
        self._console.print(
            f"[{colour}]{good} of {len(visits)} studies ended as expected; "
            f"{strays} objects went to a wrong archive; {document['seconds']:.0f} s in all.[/]"
        )

    def stays_up(self, link: str) -> None:
        self._console.print(
            f"\nThe node stays up. The dashboard, with every study to look at (a new link):\n"
            f"  [bold cyan]{link}[/]\n[dim]Ctrl-C stops and removes everything.[/]",
            soft_wrap=True,
        )


def _progress(visits: Sequence[Visit]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("hospital", "patient", "truth", "what happens", "images"):
        table.add_column(heading)
    for visit in visits:
        state = visit.facts.get("state", "")
        words = WORDS.get(state, visit.stage)
        mark = "[green]✓[/] " if visit.outcome else "[cyan]·[/] "
        images = visit.facts.get("instances") or len(visit.sent) or ""
        table.add_row(visit.tenant, visit.patient, visit.truth, mark + words, str(images))
    return table


def _results(visits: Sequence[Visit]) -> Table:
    table = Table(title="Results", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("patient", no_wrap=True)
    table.add_column("truth", no_wrap=True)
    table.add_column("what the AI says", ratio=3)
    table.add_column("what the PACS got", ratio=2)
    table.add_column("s", justify="right", no_wrap=True)
    for visit in visits:
        seconds = visit.settled_after_s
        table.add_row(
            Text.assemble(visit.patient, (f"\n{visit.tenant}", "dim")),
            visit.truth,
            _answer(visit),
            _objects(visit.facts.get("pacs", {})),
            f"{seconds:.1f}" if seconds is not None else "",
        )
    table.caption = "s: seconds from the last image's receipt to the last object in the PACS"
    return table


def _answer(visit: Visit) -> Text:
    facts = visit.facts
    state = facts.get("state", "")
    if "ai" in facts:
        urgency = facts["urgency"]
        words = Text(facts["ai"], style="bold" if facts["is_positive"] else "")
        words.append(f"\n{urgency}", style=COLOURS.get(urgency, ""))
        if state != "DELIVERED":
            words.append(f", {WORDS.get(state, state)}", style="red")
        return words
    if visit.outcome == "reason":
        return Text(f"{WORDS[state]}: {facts['reason']}", style="dim")
    return Text(f"no outcome: {WORDS.get(state, visit.stage)}", style="red")


def _objects(counts: dict[str, int]) -> str:
    parts = []
    for kind, word in KINDS.items():
        if n := counts.get(kind, 0):
            parts.append(word if n == 1 else f"{n} {word}s")
    return ", ".join(parts) or "nothing"


def _remarks(visits: Sequence[Visit]) -> list[Text]:
    """Where the model disagrees with the truth, say so: a phantom is no patient."""
    wrong = [
        visit
        for visit in visits
        if visit.outcome == "result"
        and visit.truth in ("plain", "lesion")
        and visit.facts.get("is_positive") != (visit.truth == "lesion")
    ]
    return [
        Text(
            f"{visit.patient} ({visit.tenant}): the model's answer differs from the truth. "
            "It was trained on patients, not on phantoms.",
            style="yellow",
        )
        for visit in wrong
    ]
