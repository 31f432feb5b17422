"""A finding to DICOM objects: no clock, network or disk, so the same input gives the same bytes."""

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset

from db.result import Finding
from dicom_sr import capture, evidence, key_objects, parametric_map, report, stack
from dicom_sr.attributes import keep_bytes
from dicom_sr.plan import KEYS, MAP, OVERLAY, REPORT, SUMMARY, Context, Plan, Variant

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BuiltObject:
    """A DICOM object as it is stored and sent."""

    role: str
    seq: int  # order on the association
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    data: bytes  # a whole DICOM file


def build_objects(
    finding: Finding,
    headers: Mapping[int, Dataset],
    pixels: Mapping[int, Floats],
    maps: Mapping[int, Floats],
    context: Context,
    variant: Variant,
) -> list[BuiltObject]:
    """Everything one destination gets of a result, in sending order.

    Parameters
    ----------
    headers : by image index; at least `plan.needed_images`, without pixel data
    pixels : by image index, one for each key image; rescaled values, shape (rows, columns)
    maps : by index into `finding.key_images`; raw ReLU heat maps in the matrix of their image
    """
    plan = make_plan(finding, headers[0], context, variant)
    pictures = {}
    if plan.roles & {SUMMARY, OVERLAY}:
        pictures = capture.painted(plan, headers, pixels, maps)
    datasets = _datasets(plan, headers, pictures, maps)
    return [written(role, seq, built) for seq, (role, built) in enumerate(datasets, 1)]


def make_plan(finding: Finding, header: Dataset, context: Context, variant: Variant) -> Plan:
    return Plan(
        finding=finding,
        context=context,
        variant=variant,
        study_instance_uid=str(header.StudyInstanceUID),
        zone=evidence.zone_of(header, context.zone),
    )


def _datasets(
    plan: Plan,
    headers: Mapping[int, Dataset],
    pictures: Mapping[int, NDArray[np.uint8]],
    maps: Mapping[int, Floats],
) -> Iterator[tuple[str, Dataset]]:
    if SUMMARY in plan.roles:
        yield SUMMARY, capture.summary(plan, headers[0], pictures)
    if OVERLAY in plan.roles and plan.is_stacked:
        yield OVERLAY, stack.stacked(plan, headers, pictures)
    elif OVERLAY in plan.roles:
        for index, key in enumerate(plan.key_images):
            yield (
                OVERLAY,
                capture.overlay(plan, index, headers[key.image], headers[0], pictures[index]),
            )
    if MAP in plan.roles and parametric_map.has_place(plan, headers):
        yield MAP, parametric_map.parametric_map(plan, headers, maps)
    if REPORT in plan.roles:
        for built in report.reports(plan, headers):
            yield REPORT, built
    if KEYS in plan.roles:
        yield KEYS, key_objects.key_objects(plan, headers)


def written(role: str, seq: int, built: Dataset) -> BuiltObject:
    keep_bytes(built)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, built, enforce_file_format=True)
    return BuiltObject(
        role=role,
        seq=seq,
        sop_class_uid=str(built.SOPClassUID),
        sop_instance_uid=str(built.SOPInstanceUID),
        series_instance_uid=str(built.SeriesInstanceUID),
        transfer_syntax_uid=str(built.file_meta.TransferSyntaxUID),
        data=buffer.getvalue(),
    )
