"""Batches across studies: every image once, to its own study."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inference.batcher import Batcher, Work


def make_work(key: int, n: int, lane: int = 1, bundle: str = "one") -> Work:
    inputs = np.full((n, 1, 2, 2), key, np.float32)
    inputs[:, 0, 0, 0] = np.arange(n)
    return Work(key, bundle, lane, inputs, n_outputs=2)


def echo(inputs):
    """A device whose two logits are the study's key and the image's number."""
    return np.stack([inputs[:, 0, 1, 1], inputs[:, 0, 0, 0]], axis=1)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=8),
    max_batch=st.integers(1, 33),
)
def test_every_image_is_scored_once_and_for_its_own_study(sizes, max_batch):
    batcher = Batcher(max_batch)
    works = [make_work(key, n, lane) for key, (n, lane) in enumerate(sizes, 1)]
    for work in works:
        batcher.add(work)

    done = []
    while batch := batcher.next():
        assert batch.n <= max_batch
        done += batch.scatter(echo(batch.inputs))

    assert sorted(work.key for work in done) == [work.key for work in works]
    for work in works:
        assert (work.outputs[:, 0] == work.key).all()
        assert (work.outputs[:, 1] == np.arange(len(work.inputs))).all()
    assert len(batcher) == 0


def test_h45_an_emergency_goes_into_the_very_next_batch():
    batcher = Batcher(4)
    batcher.add(make_work(1, 100, lane=2))
    batcher.next()
    batcher.add(make_work(2, 2, lane=0))

    batch = batcher.next()

    assert [(work.key, end - first) for work, first, end in batch.parts] == [(2, 2), (1, 2)]


def test_bundles_are_never_mixed_in_a_batch():
    batcher = Batcher(8)
    batcher.add(make_work(1, 2, bundle="one"))
    batcher.add(make_work(2, 2, bundle="two"))

    assert batcher.next().bundle == "one"
    assert batcher.next().bundle == "two"
    assert batcher.next() is None


def test_a_discarded_study_is_not_scored():
    batcher = Batcher(8)
    batcher.add(make_work(1, 2))
    batcher.discard(1)

    assert batcher.next() is None
