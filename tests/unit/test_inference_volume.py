"""Volume and model input: order, holes, and one function for pictures and DICOM alike."""

import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from inference import geometry
from inference.bundle import load_bundle
from inference.manifest import BodySpec, InputSpec, PixelSpec, Window
from inference.volume import NoVolume, build_volume, volume_from_pictures
from inference.window import model_input, resize, slabs
from tests.bundles.make import make_bundle
from tests.bundles.sources import ct_slice, decoded, enhanced, head, head_series, volume_of

RANGE = (-20.0, 100.0)
PIXELS = PixelSpec(domain="HU", value_range=RANGE, body=BodySpec(above=0.0))
INPUT = InputSpec(
    size=32,
    windows=(Window(centre=40.0, width=120.0),),
    mean=(0.5,),
    std=(0.25,),
    crop="body",
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return load_bundle(make_bundle(tmp_path_factory.mktemp("b") / "head")).manifest


def test_h23_images_are_sorted_by_position_whatever_their_numbers(tmp_path, manifest):
    series = head_series(8)
    ordered = [ds.SOPInstanceUID for ds in series]
    for ds, number in zip(series, (3, 3, "", 99, 0, 1, 2, 4), strict=True):
        ds.InstanceNumber = number
    random.Random(1).shuffle(series)

    volume = volume_of(series, manifest, tmp_path)

    assert [ref.sop_instance_uid for ref in volume.refs] == ordered
    assert np.diff(volume.positions_mm).tolist() == [5.0] * 7
    assert not volume.holes


def test_h23_a_hole_and_a_duplicate_are_noted(tmp_path, manifest):
    series = head_series(8)
    twice = ct_slice(head(8)[2], z=10.0)
    del series[4]

    volume = volume_of([*series, twice], manifest, tmp_path)

    assert len(volume.refs) == 7
    assert volume.holes == ((15.0, 25.0),)
    assert len(volume.notes) == 2


def test_h28_steps_of_4_and_7_mm_are_no_holes_but_a_lost_slice_is():
    places = [4.0 * i for i in range(8)] + [28 + 1.1 + 7.0 * i for i in range(8)]
    thickness = [4.0] * 8 + [7.0] * 8

    def without(*lost):
        kept = [i for i in range(16) if i not in lost]
        return geometry.holes([places[i] for i in kept], [thickness[i] for i in kept], 1.75)

    assert without() == ()
    assert without(3) == ((8.0, 16.0),)
    assert without(12) == ((places[11], places[13]),)


def test_a_series_of_which_every_other_slice_has_come_is_not_whole():
    assert len(geometry.holes([0.0, 10.0, 20.0, 30.0, 40.0], [5.0] * 5, 1.75)) == 4


def test_a_thickness_that_is_none_says_nothing():
    places = [5.0 * i for i in range(8)]

    for thickness in (None, 0.0, -5.0):
        assert geometry.holes(places, [thickness] * 8, 1.75) == ()
        assert geometry.holes(places[:3] + places[4:], [thickness] * 7, 1.75) == ((10.0, 20.0),)


def test_overlapping_slices_show_a_lost_one():
    places = [2.5 * i for i in range(10) if i != 5]

    assert geometry.holes(places, [5.0] * 9, 1.75) == ((10.0, 15.0),)


@given(st.lists(st.floats(0.3, 10), min_size=2, max_size=40), st.data())
def test_contiguous_slices_of_any_thickness_have_no_holes(thickness, data):
    places = [0.0]
    for a, b in pairwise(thickness):
        places.append(places[-1] + (a + b) / 2)

    assert geometry.holes(places, thickness, 1.75) == ()


def test_images_without_position_or_of_another_plane_make_no_volume(tmp_path, manifest):
    coronal = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0]
    tilted = head_series(4)
    tilted[2].ImageOrientationPatient = coronal
    bare = head_series(4)
    del bare[1].ImagePositionPatient

    for series in (tilted, bare):
        with pytest.raises(NoVolume):
            volume_of(series, manifest, tmp_path)


@pytest.mark.parametrize(
    ("cosines", "turn"),
    [
        ([1, 0, 0, 0, 1, 0], lambda a: a),
        ([-1, 0, 0, 0, 1, 0], lambda a: a[..., :, ::-1]),
        ([-1, 0, 0, 0, -1, 0], lambda a: a[..., ::-1, ::-1]),  # prone
        ([0, 1, 0, 1, 0, 0], lambda a: a.swapaxes(-1, -2)),
        ([0, -1, 0, 1, 0, 0], lambda a: a.swapaxes(-1, -2)[..., :, ::-1]),
    ],
)
def test_h28_the_same_head_stored_otherwise_looks_the_same_to_the_model(
    tmp_path, manifest, cosines, turn
):
    plain = volume_of(head_series(6), manifest, tmp_path)
    turned = []
    for i, pixels in enumerate(head(6)):
        turned.append(
            ct_slice(turn(pixels), z=5.0 * i, ImageOrientationPatient=[float(x) for x in cosines])
        )

    volume = volume_of(turned, manifest, tmp_path)

    np.testing.assert_array_equal(
        model_input(volume, PIXELS, INPUT).inputs, model_input(plain, PIXELS, INPUT).inputs
    )
    image = np.arange(24, dtype=np.float32).reshape(4, 6)
    turner = geometry.reorientation(tuple(map(float, cosines)))
    np.testing.assert_array_equal(turner.undo(turner.apply(image)), image)


def test_pictures_and_dicom_made_of_them_are_the_same_to_the_model(tmp_path, manifest):
    grey = (np.clip((head(6).astype(np.float32) + 20) / 120, 0, 1) * 255).astype(np.uint8)
    dicom = [
        ct_slice(picture.astype(np.uint16), 5.0 * i, RescaleSlope=120 / 255, RescaleIntercept=-20)
        for i, picture in enumerate(grey)
    ]

    pictures = volume_from_pictures(grey, RANGE)
    volume = volume_of(dicom, manifest, tmp_path)

    np.testing.assert_allclose(
        model_input(volume, PIXELS, INPUT).inputs,
        model_input(pictures, PIXELS, INPUT).inputs,
        atol=1e-5,
    )


@settings(deadline=None, max_examples=30)
@given(arrays(np.int16, (4, 48, 48), elements=st.integers(-1100, 2500)), st.booleans())
def test_nothing_beyond_the_value_range_is_looked_at(hu, crops):
    spec = replace(INPUT, crop="body" if crops else "none")
    whole = volume_from_pictures(np.zeros((4, 48, 48), np.uint8), RANGE)
    raw = replace(whole, pixels=hu.astype(np.float32))
    clipped = replace(whole, pixels=np.clip(hu, *RANGE).astype(np.float32))

    one, other = (model_input(volume, PIXELS, spec) for volume in (raw, clipped))

    assert one.boxes == other.boxes
    np.testing.assert_array_equal(one.inputs, other.inputs)
    shown = one.inputs * 0.25 + 0.5
    assert shown.min() >= -1e-5
    assert shown.max() <= 1 + 1e-5


def test_channels_are_neighbours_of_windows_and_the_ends_repeat():
    grey = np.stack([np.full((32, 32), value, np.uint8) for value in (0, 51, 102, 255)])
    spec = InputSpec(
        size=16,
        windows=(Window(centre=40, width=120), Window(centre=40, width=24)),
        mean=(0.0,) * 6,
        std=(1.0,) * 6,
        neighbours=1,
    )

    seen = model_input(volume_from_pictures(grey, RANGE), PIXELS, spec)

    levels = seen.inputs[:, :, 8, 8]
    np.testing.assert_allclose(levels[0], [0, 0, 0, 0, 0.2, 0], atol=1e-5)
    np.testing.assert_allclose(levels[2], [0.2, 0, 0.4, 0, 1, 1], atol=1e-5)
    np.testing.assert_allclose(levels[3], [0.4, 0, 1, 1, 1, 1], atol=1e-5)


def test_one_crop_holds_the_head_and_not_its_holder():
    hu = head(8)
    with_holder = hu.copy()
    with_holder[:, 118:121, 10:110] = 200
    plain = volume_from_pictures(np.zeros(hu.shape, np.uint8), RANGE)

    boxes = [
        model_input(replace(plain, pixels=pixels.astype(np.float32)), PIXELS, INPUT).boxes
        for pixels in (hu, with_holder)
    ]

    assert boxes[0] == boxes[1]
    assert len(set(boxes[0])) == 1
    top, left, bottom, right = boxes[0][0].pixels
    rows, columns = np.nonzero((hu > 0).any(axis=0))
    assert top <= rows.min()
    assert rows.max() < bottom
    assert left <= columns.min()
    assert columns.max() < right


def test_thin_slices_are_averaged_to_slabs_and_thick_ones_left(tmp_path, manifest):
    thin = [
        ct_slice(np.full((16, 16), i, np.int16), z=1.25 * i, SliceThickness=1.25) for i in range(17)
    ]
    volume = volume_of(thin, manifest, tmp_path)

    groups = slabs(volume, 5.0)

    assert [len(group) for group in groups] == [4, 4, 4, 5]  # a rest of one joins the last
    assert [i for group in groups for i in group] == list(range(17))
    assert slabs(replace(volume, thickness_mm=(5.0,) * 17), 5.0)[3] == (3,)
    spec = replace(INPUT, slab_mm=5.0, crop="none", mean=(0.0,), std=(1.0,))
    seen = model_input(volume, PIXELS, spec)
    assert seen.inputs[0, 0, 8, 8] == pytest.approx((1.5 + 20) / 120, abs=1e-5)
    assert seen.centre(0) == 2


def test_resizing_a_constant_keeps_it_and_shrinking_covers_all_pixels():
    constant = np.full((37, 91), 3.5, np.float32)
    dots = np.zeros((64, 64), np.float32)
    dots[1::4, 1::4] = 16.0

    assert np.allclose(resize(constant, (16, 16)), 3.5)
    assert resize(dots, (16, 16)).mean() == pytest.approx(1.0, rel=0.1)
    assert resize(dots, (16, 16)).min() > 0.3


def test_a_multi_frame_volume_is_read_frame_by_frame(tmp_path, manifest):
    one = decoded(enhanced(), tmp_path)

    volume = build_volume([one], manifest)

    assert volume.positions_mm == (5.0, 10.0)
    assert [ref.frame for ref in volume.refs] == [2, 1]
    assert {ref.instance_id for ref in volume.refs} == {one.instance_id}
