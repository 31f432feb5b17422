"""The raw heat maps as numbers: one Parametric Map, a frame a key image, for machines to read."""

from collections.abc import Mapping, Sequence

import highdicom as hd
import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.multival import MultiValue
from pydicom.sr.codedict import codes

from db.result import KeyImage
from dicom_sr import capture, evidence
from dicom_sr.attributes import GEOMETRY
from dicom_sr.plan import MAP, Plan

#: What a frame needs of its source to have a place, and of how many numbers.
_PLACE = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
#: What one object states once, for all its frames.
_SHARED = ("ImageOrientationPatient", "PixelSpacing")
#: Cosines and mm: scanners write the same plane a little differently from slice to slice.
_TOLERANCE = 1e-4
_DIMENSIONS = "dimorg"


def has_place(plan: Plan, headers: Mapping[int, Dataset]) -> bool:
    """Whether the key images can be frames of one object: apart, in one space, in like planes.

    A radiograph mostly states no place, and gets no map.
    """
    sources = [headers[key.image] for key in plan.key_images]
    if not all(_is_placed(source) for source in sources):
        return False
    spaces = {str(source.FrameOfReferenceUID) for source in sources}
    matrices = {(plan.image(key).rows, plan.image(key).columns) for key in plan.key_images}
    places = {tuple(_numbers(source, "ImagePositionPatient")) for source in sources}
    return (
        len(spaces) == len(matrices) == 1
        and len(places) == len(sources)
        and all(_is_like(sources[0], source) for source in sources[1:])
    )


def _is_placed(source: Dataset) -> bool:
    return bool(source.get("FrameOfReferenceUID")) and all(
        len(_numbers(source, keyword)) == n for keyword, n in _PLACE.items()
    )


def _is_like(one: Dataset, other: Dataset) -> bool:
    return all(
        np.allclose(_numbers(one, keyword), _numbers(other, keyword), rtol=0.0, atol=_TOLERANCE)
        for keyword in _SHARED
    )


def _numbers(item: Dataset, keyword: str) -> list[float]:
    """Empty where the attribute is; an attribute of one number has no length to ask for."""
    value = item.get(keyword)
    return [float(number) for number in value] if isinstance(value, MultiValue) else []


def parametric_map(
    plan: Plan, headers: Mapping[int, Dataset], maps: Mapping[int, NDArray[np.float32]]
) -> Dataset:
    """The maps of `plan.key_images`, which must have a place.

    `headers` are by image index; `maps` by index into `finding.key_images`: raw ReLU values in the
    matrix of their image.
    """
    finding, keys = plan.finding, plan.key_images
    # A value that is no number says as little as none, as on the overlay (db/paint.py).
    raw = np.stack([maps[finding.key_images.index(key)] for key in keys])
    frames = np.nan_to_num(raw, posinf=finding.map_scale).astype(np.float32)
    top = max(float(frames.max()), finding.map_scale)
    built: Dataset = hd.pm.ParametricMap(
        source_images=[_source(plan, headers, key) for key in keys],
        pixel_array=frames,
        sop_instance_uid=plan.uid(MAP),
        instance_number=1,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[_quantity(top)],
        voi_lut_transformations=[_window(top)],
        content_description=f"{finding.output.map_word} values; not for primary diagnosis",
        derivation=evidence.coded(capture.GRAD_CAM),
        **evidence.series_values(plan, MAP, finding.output.map_series),
    )
    _order_frames(built, plan, headers, frames)
    _lay_out(built, [headers[key.image] for key in keys])
    _name_dimensions(built, plan)
    capture.refer(built, [plan.image(key) for key in keys], is_in_place=True)
    capture.describe(built, plan, headers[0])
    evidence.stamp(built, plan, headers[0])
    return built


def _source(plan: Plan, headers: Mapping[int, Dataset], key: KeyImage) -> Dataset:
    """What highdicom needs of a key image: its place and matrix, and blanks (evidence.carrier).

    The plane is the first one's: highdicom takes the slightest difference for another.
    """
    image, source = plan.image(key), evidence.carrier(headers[0])
    source.update(_copied(headers[key.image], *GEOMETRY))
    source.update(_copied(headers[plan.key_images[0].image], *_SHARED))
    source.SeriesInstanceUID = image.series_instance_uid
    source.SOPInstanceUID = image.sop_instance_uid
    source.SliceThickness = source.get("SliceThickness")  # it must be there; see _lay_out
    source.Rows, source.Columns = image.rows, image.columns
    return source


def _quantity(top: float) -> hd.pm.RealWorldValueMapping:
    """The stored values are the values: 0 to `top`, without unit."""
    return hd.pm.RealWorldValueMapping(
        lut_label="GRAD_CAM",
        lut_explanation=capture.GRAD_CAM.meaning,
        unit=codes.UCUM.NoUnits,
        value_range=(0.0, top),
        slope=1.0,
        intercept=0.0,
        quantity_definition=evidence.coded(capture.GRAD_CAM),
    )


def _window(top: float) -> hd.VOILUTTransformation:
    """All of the study's values, on the one scale that its overlays have too."""
    width = top if top > 0.0 else 1.0
    return hd.VOILUTTransformation(
        window_center=float(f"{width / 2:.6g}"), window_width=float(f"{width:.6g}")
    )


def _order_frames(
    built: Dataset, plan: Plan, headers: Mapping[int, Dataset], frames: NDArray[np.float32]
) -> None:
    """Frame n is key image n, as overlay n is; each says what it was made from, and for which
    finding. highdicom has an order of its own, and knows no labels and no frames of a source."""
    items = []
    for number, key in enumerate(plan.key_images, 1):
        item, header = Dataset(), headers[key.image]
        derivation = Dataset()
        derivation.DerivationCodeSequence = [evidence.coded(capture.GRAD_CAM)]
        derivation.SourceImageSequence = [capture.source_item(plan.image(key), is_in_place=True)]
        item.DerivationImageSequence = [derivation]
        content = Dataset()
        content.DimensionIndexValues = [number]
        content.FrameLabel = plan.label(key).words[:64]
        item.FrameContentSequence = [content]
        item.PlanePositionSequence = [_copied(header, "ImagePositionPatient")]
        items.append(item)
    built.PerFrameFunctionalGroupsSequence = items
    built.FloatPixelData = frames.astype("<f4").tobytes()


def _copied(header: Dataset, *keywords: str) -> Dataset:
    """The attributes as the source has them, empty ones left out."""
    item = Dataset()
    for keyword in keywords:
        if header.get(keyword) not in (None, ""):
            item[keyword] = header[keyword]
    return item


def _lay_out(built: Dataset, sources: Sequence[Dataset]) -> None:
    """Planes as the `sources` of the frames have them, without a claim that they fill a volume.

    Old scanners change the slice thickness inside a series: then each frame states its own.
    """
    shared = built.SharedFunctionalGroupsSequence[0]
    shared.PlaneOrientationSequence = [_copied(sources[0], "ImageOrientationPatient")]
    # Chosen images, regular by chance: no spacing, for nothing is known of what lies between them.
    measures = [_copied(source, "PixelSpacing", "SliceThickness") for source in sources]
    built.pop("DimensionOrganizationType", None)
    if all(one == measures[0] for one in measures):
        shared.PixelMeasuresSequence = measures[:1]
        return
    del shared.PixelMeasuresSequence
    for item, one in zip(built.PerFrameFunctionalGroupsSequence, measures, strict=True):
        item.PixelMeasuresSequence = [one]


def _name_dimensions(built: Dataset, plan: Plan) -> None:
    organization = plan.uid(_DIMENSIONS)
    for item in (*built.DimensionOrganizationSequence, *built.DimensionIndexSequence):
        item.DimensionOrganizationUID = organization
