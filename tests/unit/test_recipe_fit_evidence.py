"""Views, and heads that judge cells: what is fitted to drawn maps finds what was drawn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.evidence import EvidenceHead
from inference.manifest import EvidenceSpec
from weights.recipe import augment
from weights.recipe.augment import MIRRORED, PLAIN, View, views_with_bleeds
from weights.recipe.backbone import Backbone
from weights.recipe.bank import write
from weights.recipe.bleeds import inside_skull, with_bleed
from weights.recipe.candidates import sequence
from weights.recipe.candidates.evidence import Evidence
from weights.recipe.candidates.sequence import Sequence
from weights.recipe.data import LesionBox
from weights.recipe.examples import Examples
from weights.recipe.figures import auc
from weights.recipe.fitting import Batch, Schedule, evidence_loss, fit
from weights.recipe.phantoms import drawn_head
from weights.recipe.placing import arrays, device_of

SPEC = EvidenceSpec(stages=(1, 2), grid=2, width=4, members=1, cells=2)
SIDE = 6
NOTHING = Backbone("none", {}, "nowhere")


class Drawn:
    """Stands in for a bank: maps of four channels, one of which is high where a lesion is."""

    device = torch.device("cpu")

    def __init__(self, maps):
        self._maps = maps

    def features(self, view, progress=None):
        return self._maps if view == PLAIN else self._maps[..., ::-1]

    def places(self, view):
        sign = 1.0 if view == PLAIN else -1.0
        return np.tile(np.array([[sign, 0, 0], [0, 1, 0]], np.float32), (len(self._maps), 1, 1))


def test_a_plain_view_changes_nothing_and_a_mirrored_one_comes_back():
    images = torch.rand(3, 8, 8)

    plain, _ = augment.seen(images, PLAIN, PLAIN.generator(0))
    mirrored, places = augment.seen(images, MIRRORED, MIRRORED.generator(0))

    assert torch.equal(plain, images)
    torch.testing.assert_close(augment.moved_by(images, places), mirrored)
    assert torch.equal(mirrored.flip(2), images)


def test_the_same_seed_draws_the_same_view_and_another_another():
    images = torch.rand(4, 16, 16)

    def drawn(name, seed):
        view = View(name)
        return augment.seen(images, view, view.generator(seed))[0]

    assert torch.equal(drawn("altered-0", 1), drawn("altered-0", 1))
    assert not torch.equal(drawn("altered-0", 1), drawn("altered-1", 1))
    assert not torch.equal(drawn("altered-0", 1), drawn("altered-0", 2))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["altered-0", "copied-0"]))
def test_a_lesion_map_follows_the_altered_head(seed, name):
    """A bright block is where the moved box says, wherever chance put it."""
    images = torch.full((1, 64, 64), 0.3)
    images[:, 20:28, 34:44] = 1.0
    box = torch.zeros(1, 64, 64)
    box[:, 20:28, 34:44] = 1.0
    view = View(name)

    seen, places = augment.seen(images, view, view.generator(seed))

    inside = augment.moved_by(box, places) > 0.9
    assert float(seen.min()) >= 0
    assert float(seen.max()) <= 1
    assert float(seen[inside].mean()) > float(seen[~inside].mean()) + 0.2


@pytest.mark.parametrize("name", ["altered-0", "copied-0"])
def test_air_stays_air(name):
    images = torch.zeros(5, 32, 32)

    seen, _ = augment.seen(images, View(name), View(name).generator(3))

    assert float(seen.max()) == 0


def test_a_copied_view_has_lost_its_fine_grain():
    images = 0.4 + 0.4 * torch.rand(8, 320, 320)

    def grain(name):
        seen, _ = augment.seen(images, View(name), View(name).generator(0))
        return float((seen[:, 1:] - seen[:, :-1])[:, 80:240, 80:240].abs().mean())

    assert grain("copied-0") < 0.6 * grain("plain")


def test_cells_outside_a_box_must_be_quiet_and_some_inside_must_speak():
    labels, covered = torch.tensor([[1.0]]), torch.zeros(1, SIDE, SIDE)
    covered[0, 1:3, 1:3] = 1
    quiet = torch.full((1, 1, 1, SIDE, SIDE), -4.0)
    right, wrong = quiet.clone(), quiet.clone()
    right[..., 1:3, 1:3] = 4
    wrong[..., 4:, 4:] = 4

    losses = [float(loss_of(e, labels, covered)) for e in (right, quiet, wrong)]

    assert losses[0] < 0.2 < losses[1]
    assert losses[0] < losses[2]


def test_a_positive_slice_that_nobody_marked_may_speak_anywhere():
    labels, covered = torch.tensor([[1.0]]), torch.zeros(1, SIDE, SIDE)
    speaks = torch.full((1, 1, 1, SIDE, SIDE), 6.0)

    assert float(loss_of(speaks, labels, covered)) < 0.01


def test_one_class_alone_cannot_be_fitted():
    head = EvidenceHead(4, 1, SPEC)

    with pytest.raises(ValueError, match="with and without"):
        fit(
            None, head.parameters(), None, np.zeros(9, np.bool_), np.arange(9),
            Schedule(samples=64), seed=0,
        )  # fmt: skip


@pytest.fixture(scope="module")
def learnt():
    examples, maps = drawn_examples()
    bank = Drawn(maps.astype(np.float16))
    schedule = Schedule(samples=6_400, batch=32, rate=5e-3)
    candidate = Evidence(bank, NOTHING, SPEC, 0, dropout=0.0, schedule=schedule)
    rows = np.concatenate(examples.groups[::2])
    return candidate, examples, rows, candidate.fit(examples, rows, seed=0, given=())


def test_a_fitted_head_finds_drawn_lesions_in_patients_it_has_not_seen(learnt):
    _, examples, rows, made = learnt
    unseen = np.setdiff1d(np.arange(len(examples.labels)), rows)

    assert auc(made.logits[unseen, 0], examples.labels[unseen, 0]) > 0.95


def test_its_heat_maps_peak_on_the_lesion(learnt):
    candidate, examples, _, made = learnt
    how = candidate.explanations[0]
    marked = np.array(sorted(examples.lesions))[-20:]

    maps = candidate.maps(made.weights, marked, how)
    guesses = candidate.maps(candidate.untrained(made.weights, 1), marked, how)

    def hits(some):
        peaks = [np.unravel_index(int(one.argmax()), one.shape) for one in some]
        boxes = [examples.lesions[int(row)][0] for row in marked]
        return sum(
            b.left <= (x + 0.5) / SIDE <= b.right and b.top <= (y + 0.5) / SIDE <= b.bottom
            for (y, x), b in zip(peaks, boxes, strict=True)
        )

    assert hits(maps) >= 18
    assert hits(maps) > hits(guesses)


def test_the_same_seed_fits_the_same_head(learnt):
    candidate, examples, rows, made = learnt

    again = candidate.fit(examples, rows, seed=0, given=())

    np.testing.assert_allclose(again.logits, made.logits, atol=1e-4)


class Elsewhere(Drawn):
    """On a device that computes nothing, and refuses to work with what lies on the CPU."""

    device = torch.device("meta")


class Seen(Exception):
    """What was asked has been seen: there is nothing to compute with."""


def test_a_fit_runs_on_the_device_of_its_bank(learnt, monkeypatch):
    """Head, standard and batches: were one of them left behind, the head would raise."""
    candidate, examples, rows, _ = learnt
    there = replace(candidate, bank=Elsewhere(candidate.bank.features(PLAIN)), dropout=0.3)

    def loss(evidence, batch, cells):
        parts = (evidence, batch.inputs, batch.labels, batch.covered, batch.heard)
        assert {str(part.device) for part in parts} == {"meta"}
        assert evidence.requires_grad
        raise Seen

    monkeypatch.setattr("weights.recipe.candidates.evidence.evidence_loss", loss)

    with pytest.raises(Seen):
        there.fit(examples, rows, seed=0, given=())


@pytest.mark.parametrize("kind", ["gru", "attention", "convolution"])
def test_a_fit_over_slices_runs_on_the_device_of_its_bank(kind, monkeypatch):
    examples, maps = drawn_examples()
    bank = Elsewhere(maps.max(axis=(2, 3)).astype(np.float16))

    def loss(network, features, labels):
        padded, is_there = sequence._padded(features)
        answers = network(padded, is_there)
        parts = (*features, *labels, is_there, answers)
        assert {str(part.device) for part in parts} == {"meta"}
        raise Seen

    monkeypatch.setattr(sequence, "_loss", loss)

    with pytest.raises(Seen):
        Sequence(bank, "none", kind).fit(examples, np.arange(len(maps)), seed=0, given=())


def test_what_was_fitted_elsewhere_is_read_back_there(learnt):
    candidate, _, _, made = learnt
    there = replace(candidate, bank=Elsewhere(candidate.bank.features(PLAIN)))

    head = there.head(made.weights)

    assert {str(one.device) for one in head.parameters()} == {"meta"}
    assert device_of(candidate.head(made.weights)) == torch.device("cpu")
    for name, value in arrays(candidate.head(made.weights), "head.").items():
        assert value.tobytes() == made.weights[name.removeprefix("head.")].tobytes()


@pytest.mark.parametrize("kind", ["gru", "attention", "convolution"])
def test_a_head_over_slices_learns_from_its_own_patients_alone(kind):
    examples, maps = drawn_examples()
    bank = Drawn(maps.max(axis=(2, 3)).astype(np.float16))
    rows = np.concatenate(examples.groups[::2])
    unseen = np.setdiff1d(np.arange(len(examples.labels)), rows)

    made = Sequence(bank, "none", kind).fit(examples, rows, seed=0, given=())

    assert auc(made.logits[unseen, 0], examples.labels[unseen, 0]) > 0.9
    labels = examples.labels.copy()
    labels[unseen] = ~labels[unseen]
    lied_to = replace(examples, labels=labels)
    again = Sequence(bank, "none", kind).fit(lied_to, rows, seed=0, given=())
    np.testing.assert_allclose(again.logits, made.logits, atol=1e-5)


def test_a_head_learns_from_drawn_bleeds_what_no_patient_shows():
    """Real lesions are in channel 1, drawn ones in channel 2: both are found in unseen slices."""
    examples, maps = drawn_examples()
    bank = WithBleeds(maps.astype(np.float16))
    schedule = Schedule(samples=6_400, batch=32, rate=5e-3)
    candidate = Evidence(bank, NOTHING, SPEC, 1, dropout=0.0, schedule=schedule, bleeds=1)
    rows = np.concatenate(examples.groups[::2])
    unseen = np.setdiff1d(np.arange(len(examples.labels)), rows)
    clear = unseen[~examples.labels[unseen, 0]]

    made = candidate.fit(examples, rows, seed=0, given=())

    view = views_with_bleeds(1)[0]
    drawn = candidate.logits(made.weights, view, clear)[:, 0]
    plain = candidate.logits(made.weights, PLAIN, clear)[:, 0]
    assert (drawn > plain).mean() > 0.95
    assert auc(made.logits[unseen, 0], examples.labels[unseen, 0]) > 0.9


def test_how_a_slice_looks_does_not_tell_what_it_is():
    """Views with bleeds are altered ones: as many of the other slices must look altered."""
    examples, maps = drawn_examples()
    candidate = Evidence(Looks(maps.astype(np.float16)), NOTHING, SPEC, 2, copied=1, bleeds=2)
    rows = np.concatenate(examples.groups)
    rng = np.random.default_rng(0)
    positive, negative = rows[examples.labels[:, 0]], rows[~examples.labels[:, 0]]
    shelves = candidate.shelves(examples, rows)

    looks = [
        shelves.draw(rng.choice(some, 4_000), rng).inputs[:, 3, 0, 0].numpy()
        for some in (positive, negative)
    ]

    shares = [(some == ALTERED_LOOK).mean() for some in looks]
    assert shares[0] == pytest.approx(shares[1], abs=0.04)
    assert 0.6 < shares[0] < 0.8


def test_bleeds_are_drawn_only_where_other_slices_look_altered_too():
    with pytest.raises(ValueError, match="without altered views"):
        Evidence(Drawn(np.zeros((1, 4, SIDE, SIDE))), NOTHING, SPEC, 0, bleeds=1)


@pytest.mark.parametrize("seed", range(12))
def test_a_drawn_bleed_is_brighter_and_inside_the_skull(seed):
    image = (drawn_head() + np.random.default_rng(seed).normal(0, 3, (256, 256))).astype(np.float32)

    made, where = with_bleed(image, np.random.default_rng(seed))

    changed = where > 0
    assert changed.sum() >= 5
    assert inside_skull(image)[changed].all()
    assert made[changed].mean() > image[changed].mean() + 10
    assert np.array_equal(made[~inside_skull(image)], image[~inside_skull(image)])
    again, _ = with_bleed(image, np.random.default_rng(seed))
    assert np.array_equal(made, again)


def test_where_no_skull_closes_nothing_is_drawn():
    image = np.full((128, 128), 30.0, np.float32)

    made, where = with_bleed(image, np.random.default_rng(0))

    assert np.array_equal(made, image)
    assert not where.any()


def test_a_label_that_is_not_known_teaches_nothing():
    evidence = torch.randn(2, 1, 2, SIDE, SIDE)
    covered = torch.zeros(2, SIDE, SIDE)
    known, unknown = torch.tensor([[1.0, 0.0]] * 2), torch.tensor([[1.0, float("nan")]] * 2)
    alone = evidence[:, :, :1]

    of_unknown = loss_of(evidence, unknown, covered)
    assert of_unknown == pytest.approx(loss_of(alone, unknown[:, :1], covered))
    assert loss_of(evidence, known, covered) > of_unknown


def test_a_teacher_is_heard_cell_by_cell_and_where_it_is_silent_not():
    labels, covered = torch.tensor([[1.0]]), torch.zeros(1, SIDE, SIDE)
    evidence = torch.full((1, 1, 1, SIDE, SIDE), -4.0)
    evidence[..., 2:4, 2:4] = 4
    agrees, silent = torch.sigmoid(evidence[:, 0, 0]), torch.full((1, SIDE, SIDE), torch.nan)
    contradicts = 1 - agrees

    alone = loss_of(evidence, labels, covered)

    assert loss_of(evidence, labels, covered, silent) == alone
    assert loss_of(evidence, labels, covered, contradicts) > loss_of(
        evidence, labels, covered, agrees
    )


def test_a_taught_head_follows_its_teacher_into_the_mirror(learnt):
    """Nobody marked a slice for it: where it looks it has from its teacher, in every view."""
    narrow, examples, rows, _ = learnt
    teacher = replace(narrow, spec=replace(SPEC, width=16))
    said = teacher.fit(examples, rows, seed=0, given=())
    unmarked = replace(examples, lesions={})
    student = replace(teacher, teacher=teacher)
    unseen = np.setdiff1d(np.arange(len(examples.labels)), rows)
    wanted = teacher.says(said.weights)[unseen].flatten()

    made = student.fit(unmarked, rows, seed=0, given=(said,))
    alone = teacher.fit(unmarked, rows, seed=0, given=())

    def likeness(fit):
        return np.corrcoef(student.says(fit.weights)[unseen].flatten(), wanted)[0, 1]

    assert likeness(made) > 0.9
    assert likeness(made) > likeness(alone) + 0.02
    assert student.needs == (teacher,)
    assert student.family != teacher.family
    # What is kept goes by the name: another teacher, another student.
    other = replace(teacher, bleeds=2, altered=2, teacher=replace(teacher, dropout=0.1))
    assert other.name != replace(other, teacher=teacher).name
    assert "distillation" in student.words
    assert "distillation" not in teacher.words


class WithBleeds(Drawn):
    """In the view with bleeds every slice has one, in another channel than patients' are."""

    def features(self, view, progress=None):
        if not view.has_bleeds:
            return super().features(view, progress)
        maps = self._maps.copy()
        maps[:, 2, 1:3, 2:4] += 4
        return maps

    def bleeds(self, view):
        made = np.zeros((len(self._maps), SIDE, SIDE), np.float32)
        made[:, 1:3, 2:4] = 1
        return made


ALTERED_LOOK = 50.0


class Looks(WithBleeds):
    """An altered view has one look, with bleeds or without; the others have another."""

    def features(self, view, progress=None):
        maps = super().features(view, progress).copy()
        maps[:, 3] = ALTERED_LOOK if view.is_altered or view.has_bleeds else 0.0
        return maps


def test_an_array_has_its_name_only_once_it_is_whole(tmp_path):
    path = tmp_path / "values.npy"

    def breaks():
        yield np.ones((2, 3))
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(path, breaks(), total=4)
    assert not path.exists()

    write(path, iter([np.ones((2, 3)), np.zeros((2, 3))]), total=4)
    assert np.load(path).sum() == 6


def drawn_examples():
    """20 patients of 8 slices; every second has three slices with a lesion of 2 x 2 cells."""
    rng = np.random.default_rng(5)
    labels = np.zeros((160, 1), np.bool_)
    groups = tuple(np.split(np.arange(160), 20))
    maps = rng.normal(size=(160, 4, SIDE, SIDE))
    lesions = {}
    for place, rows in enumerate(groups):
        if place % 4 > 1:
            continue
        for row in rows[2:5]:
            y, x = rng.integers(SIDE - 1, size=2)
            labels[row, 0] = True
            maps[row, 1, y : y + 2, x : x + 2] += 4
            box = LesionBox(x / SIDE, y / SIDE, (x + 2) / SIDE, (y + 2) / SIDE)
            lesions[int(row)] = (box,)
    return Examples(labels, groups, np.arange(20) % 4, lesions), maps


def loss_of(evidence, labels, covered, heard=None):
    return float(evidence_loss(evidence, Batch(evidence, labels, covered, heard), 2))
