"""What is chosen and judged in folds, by patients that neither the fit nor the choice has seen."""

import json
import tomllib
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from inference.manifest import Aggregation
from weights.recipe.bank import folder_for
from weights.recipe.candidates.candidate import Candidate, Fit, Mean, servable
from weights.recipe.compare import compared
from weights.recipe.data import LesionBox
from weights.recipe.examples import ALL, Examples, lesion_map
from weights.recipe.figures import auc
from weights.recipe.fits import Fits
from weights.recipe.nested import AGGREGATIONS, NOISY_OR, Recipe, Smoothing, beats
from weights.recipe.pointing import Pointing
from weights.recipe.ranked import cross_fitted, fit_ranked
from weights.recipe.ship import _aggregation_line
from weights.recipe.template import draft

PATIENTS, SLICES, FOLDS = 40, 6, 4


@dataclass(frozen=True, eq=False)
class Made:
    """A candidate that gives the truth of what it learnt from, and so much of it of the rest."""

    family: str
    skill: float
    needs: tuple[Candidate, ...] = ()
    learnt: list[frozenset[int]] = field(default_factory=list)  # rows of each fit

    @property
    def name(self):
        return self.family

    def prepare(self, progress):
        pass

    def fit(self, examples, rows, *, seed, given):
        self.learnt.append(frozenset(rows.tolist()))
        rng = np.random.default_rng(len(rows))
        truth = examples.labels.astype(float)
        logits = rng.normal(size=truth.shape) + self.skill * truth
        logits[rows] = 20 * truth[rows] - 10  # memory
        return Fit({"n": np.array([len(rows)], np.float32)}, logits, {"loss": 0.5})


def test_n_folds_need_one_fit_a_pair_a_fold_and_one_for_all():
    splits = list(drawn().splits())

    assert len(splits) == len(set(splits)) == 1 + FOLDS + FOLDS * (FOLDS - 1) // 2
    assert ALL in splits


def test_what_is_only_memory_is_worth_nothing_out_of_fold(tmp_path):
    recipe = recipe_of(tmp_path, Made("memory", 0.0))

    found = recipe.out_of_fold()

    [figures] = compared(recipe, seed=0)
    assert figures["slice_auc"]["low"] < 0.5 < figures["slice_auc"]["high"]
    assert np.abs(found.logits[:, 0]).max() < 6  # memory speaks with 10


def test_no_fit_that_judges_or_chooses_has_seen_whom_it_judges(tmp_path, monkeypatch):
    candidate = Made("one", 2.0)
    recipe = recipe_of(tmp_path, candidate)
    asked = []
    real = Fits.get
    monkeypatch.setattr(
        Fits, "get", lambda self, one, split: asked.append(split) or real(self, one, split)
    )

    for fold in range(FOLDS):
        asked.clear()
        recipe.choose(frozenset({fold}))
        assert asked
        assert all(fold in split for split in asked)


def test_no_patient_is_on_both_sides_of_a_fit(tmp_path):
    candidate, examples = Made("one", 2.0), drawn()
    fits = Fits(tmp_path, examples, seed=0)

    for split in examples.splits():
        fits.get(candidate, split)
        held = set(np.flatnonzero(np.isin(examples.folds, sorted(split))).tolist())
        assert {int(examples.patient_of[row]) for row in candidate.learnt[-1]} == (
            set(range(PATIENTS)) - held
        )


def test_the_better_family_is_chosen_and_an_equal_one_is_not(tmp_path):
    plain, better, equal = Made("plain", 1.0), Made("better", 4.0), Made("equal", 1.0)

    assert recipe_of(tmp_path / "a", plain, better).choose().candidate is better
    assert recipe_of(tmp_path / "b", plain, equal).choose().candidate is plain
    assert recipe_of(tmp_path / "c", better, plain).choose().candidate is better


def test_a_fit_is_made_once_and_logged(tmp_path):
    candidate, examples = Made("one", 1.0), drawn()

    for _ in range(2):
        fits = Fits(tmp_path, examples, seed=0)
        fits.make([candidate], examples.splits())

    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(candidate.learnt) == len(log) == len(list(examples.splits()))
    assert {tuple(line["held_out_folds"]) for line in log} == {
        tuple(sorted(split)) for split in examples.splits()
    }
    assert log[0]["loss"] == 0.5


def test_what_changes_the_input_gets_a_cache_of_its_own_and_what_refuses_does_not(tmp_path):
    manifest = draft()
    smaller = replace(manifest, input=replace(manifest.input, size=288))
    windows = replace(manifest.input, windows=manifest.input.windows[::-1])
    stricter = replace(manifest, pixels=replace(manifest.pixels, gates=()))

    folder = folder_for(manifest, "these", tmp_path)

    assert folder_for(smaller, "these", tmp_path) != folder
    assert folder_for(replace(manifest, input=windows), "these", tmp_path) != folder
    assert folder_for(manifest, "others", tmp_path) != folder
    assert folder_for(stricter, "these", tmp_path) == folder


def test_other_labels_or_folds_are_other_fits(tmp_path):
    candidate = Made("one", 1.0)
    for seed in (0, 1):
        Fits(tmp_path, drawn(seed), seed=0).get(candidate, ALL)

    assert len(candidate.learnt) == 2


def test_a_mean_learns_from_its_parts_of_the_same_split(tmp_path):
    parts = (Made("one", 1.0), Made("two", 3.0))
    fits = Fits(tmp_path, drawn(), seed=0)
    split = frozenset({1})

    made = fits.get(Mean(parts), split)

    wanted = np.mean([fits.get(part, split).logits for part in parts], axis=0)
    np.testing.assert_allclose(made.logits, wanted)
    assert parts[0].learnt == parts[1].learnt


def test_what_no_bundle_can_hold_is_not_shipped():
    with pytest.raises(TypeError, match="no bundle can hold"):
        servable(Mean((Made("one", 1.0),)))


@given(st.integers(1, 3), st.floats(0, 1), st.integers(2, 9))
def test_smoothing_keeps_a_patients_mean_level_and_never_mixes_patients(context, share, n):
    rng = np.random.default_rng(n)
    logits = np.concatenate([rng.normal(size=(n, 2)), np.full((n, 2), 100.0)])
    groups = [np.arange(n), np.arange(n, 2 * n)]

    made = Smoothing(context, share).apply(logits, groups)

    assert made[:n].max() < 50
    np.testing.assert_allclose(made[n:], 100.0, rtol=1e-5)


def test_no_smoothing_changes_nothing():
    logits = np.random.default_rng(0).normal(size=(5, 2))

    np.testing.assert_array_equal(Smoothing(0, 0.0).apply(logits, [np.arange(5)]), logits)
    np.testing.assert_array_equal(Smoothing(0, 0.0).mix(2), np.eye(2))


def test_luck_does_not_beat():
    rng = np.random.default_rng(3)
    truth = np.arange(60) % 3 == 0
    groups = np.split(np.arange(60), 20)
    good = truth + rng.normal(0, 0.3, 60)

    assert beats(good, rng.normal(size=60), truth, groups, seed=0)
    assert not beats(good + rng.normal(0, 1e-3, 60), good, truth, groups, seed=0)


def test_a_peak_inside_a_box_is_a_hit_and_energy_is_the_share_inside():
    image = np.zeros((10, 10), np.float32)
    image[2, 2], image[8, 8] = 3.0, 1.0
    box = LesionBox(left=0.1, top=0.1, right=0.4, bottom=0.4)

    assert Pointing.of(image, [box]) == Pointing(1.0, 0.75)
    assert Pointing.of(image[::-1], [box]).hit == 0.0
    assert Pointing.of(np.zeros((4, 4), np.float32), [box]) == Pointing(0.0, 0.0)


def test_a_lesion_map_tells_how_much_of_each_cell_is_covered():
    made = lesion_map([LesionBox(left=0.0, top=0.25, right=0.375, bottom=0.5)], 4)

    assert made.tolist() == [[0, 0, 0, 0], [1, 0.5, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def recipe_of(folder, *candidates):
    return Recipe(Fits(folder, drawn(), seed=0), candidates, seed=0)


def drawn(seed=0):
    """Every second patient has two positive slices."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((PATIENTS * SLICES, 2), np.bool_)
    groups = tuple(np.split(np.arange(len(labels)), PATIENTS))
    for rows in groups[::2]:
        at = rng.integers(SLICES - 1)
        labels[rows[at : at + 2], 0] = True
    folds = np.empty(PATIENTS, np.int64)
    for part in (np.arange(0, PATIENTS, 2), np.arange(1, PATIENTS, 2)):
        folds[rng.permutation(part)] = np.arange(len(part)) % FOLDS
    return Examples(labels, groups, folds, {})


def test_learnt_weights_find_which_images_tell():
    """Only each study's second highest image knows: the highest is noise."""
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 2 == 0
    studies = [
        np.array([9 + 3 * rng.normal(), 2.0 * positive + rng.normal(), *(-9 + rng.normal(size=6))])
        for positive in truth
    ]

    made = fit_ranked(studies, truth)

    assert np.argmax(made.weights) == 1
    assert sum(made.weights) == pytest.approx(1, abs=0.01)
    unseen = cross_fitted(studies, truth, seed=0)
    highest = np.array([study.max() for study in studies])
    assert auc(unseen, truth) > auc(highest, truth) + 0.2


def test_learnt_weights_of_a_study_never_saw_it():
    rng = np.random.default_rng(1)
    truth = np.arange(40) % 2 == 0
    studies = [rng.normal(size=6) + positive for positive in truth]
    changed = [*studies[:-1], studies[-1] + 50]

    before, after = (cross_fitted(some, truth, seed=0) for some in (studies, changed))

    # The same weights judged it both times: all its logits rose by 50, and so did their mean.
    assert after[-1] - before[-1] == pytest.approx(50)
    assert (after[:-1] != before[:-1]).any()  # of others it was learnt from


def test_noisy_or_is_told_and_never_chosen(tmp_path, monkeypatch):
    """Even where its log-loss is by far the best."""

    def ways(logits, groups, truth, *, seed):
        noise = np.random.default_rng(seed).normal(size=len(truth))
        return {AGGREGATIONS[0]: noise, NOISY_OR: noise + 4 * truth}

    monkeypatch.setattr("weights.recipe.nested._aggregations", ways)
    recipe = recipe_of(tmp_path, Made("good", 0.9))

    chosen = recipe.choose()

    assert chosen.aggregation == AGGREGATIONS[0]
    losses = chosen.aggregation_log_losses
    assert losses["noisy_or"] < losses[str(AGGREGATIONS[0])]


@pytest.mark.parametrize(
    "how",
    [
        Aggregation(kind="max"),
        Aggregation(kind="topk_mean", k=3),
        Aggregation(kind="ranked", k=2, weights=(0.75, 0.25)),
    ],
)
def test_every_aggregation_that_may_be_chosen_can_stand_in_a_manifest(how):
    line = tomllib.loads(f"aggregation = {_aggregation_line(how)}")["aggregation"]

    assert TypeAdapter(Aggregation).validate_json(json.dumps(line)) == how
