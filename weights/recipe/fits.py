"""All fits of a run, each made once and kept: a run that was stopped goes on where it was."""

import hashlib
import json
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np

from weights.recipe.candidates.candidate import Candidate, Fit
from weights.recipe.examples import Examples, Split
from weights.recipe.progress import Progress, silent
from weights.recipe.sources import INFERENCE, RECIPE, code_digest

_MADE_BY = (
    *(RECIPE / "candidates").glob("*.py"),
    *(
        RECIPE / f"{name}.py"
        for name in ("fitting", "standard", "placing", "examples", "folds", "bleeds")
    ),
    INFERENCE / "evidence.py",
)


class Fits:
    """(candidate, split) -> fit; `log.jsonl` in the folder has one line for each that was made."""

    def __init__(self, folder: Path, examples: Examples, *, seed: int) -> None:
        self._folder = folder
        self._examples = examples
        self._seed = seed
        # Other data, labels, folds or code, and what was kept says nothing.
        facts = hashlib.sha256(examples.folds.tobytes() + examples.labels.tobytes())
        for rows in examples.groups:
            facts.update(rows.tobytes())
        facts.update(repr(sorted(examples.lesions.items())).encode())
        facts.update(code_digest(_MADE_BY).encode())
        self._facts = facts.hexdigest()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def examples(self) -> Examples:
        return self._examples

    def make(
        self, candidates: Iterable[Candidate], splits: Iterable[Split], progress: Progress = silent
    ) -> None:
        """Every fit that is not there yet."""
        candidates = tuple(candidates)
        for candidate in candidates:
            candidate.prepare(progress)
        wanted = list(product(candidates, splits))
        for done, (candidate, split) in enumerate(wanted):
            progress("fits", done, len(wanted))
            if not self._path(candidate, split).exists():
                self._make(candidate, split)
        progress("fits", len(wanted), len(wanted))

    def get(self, candidate: Candidate, split: Split) -> Fit:
        """Made now, if it is not there yet."""
        path = self._path(candidate, split)
        if not path.exists():
            self._make(candidate, split)
        with np.load(path) as kept:
            weights = {name[2:]: kept[name] for name in kept.files if name.startswith("w.")}
            return Fit(weights, kept["logits"])

    def _make(self, candidate: Candidate, split: Split) -> None:
        examples, started = self._examples, time.monotonic()
        patients = examples.patients(split, inside=False)
        rows = examples.rows(patients)
        given = tuple(self.get(other, split) for other in candidate.needs)
        fit = candidate.fit(examples, rows, seed=self._seed, given=given)
        path = self._path(candidate, split)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            weights = {f"w.{name}": value for name, value in fit.weights.items()}
            np.savez(file, logits=fit.logits, **weights)  # type: ignore[arg-type]  # its stub
        part.replace(path)
        line = {
            "candidate": candidate.name,
            "held_out_folds": sorted(split),
            "patients": len(patients),
            "slices": len(rows),
            "seconds": round(time.monotonic() - started, 1),
            **{name: round(value, 4) for name, value in fit.log.items()},
        }
        with (self._folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def _path(self, candidate: Candidate, split: Split) -> Path:
        key = hashlib.sha256(f"{candidate.name} {self._seed} {self._facts}".encode()).hexdigest()
        held = "-".join(map(str, sorted(split))) or "none"
        return self._folder / f"{candidate.family.replace(' ', '_')}.{key[:12]}.{held}.npz"
