"""Findings made up for tests, over the real head CT beside the project or over synthetic slices."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.uid import CTImageStorage

from db.result import (
    CalibratedProbability,
    Code,
    Finding,
    ImageRef,
    KeyImage,
    LabelResult,
    LabelStatus,
    ModelIdentity,
    OutputSpec,
    RawScore,
    Region,
    Urgency,
)

HEAD_CT = Path(os.environ.get("VIGIL_TEST_DATA", "../shared/data")) / "head-ct-ge"

CODES = {
    "any": Code("1386000", "SCT", "Intracranial hemorrhage"),
    "epidural": Code("82999001", "SCT", "Epidural intracranial hemorrhage"),
    "intraparenchymal": Code("274100004", "SCT", "Intracerebral hemorrhage"),
    "intraventricular": Code("23276006", "SCT", "Intraventricular hemorrhage"),
    "subarachnoid": Code("21454007", "SCT", "Subarachnoid intracranial hemorrhage"),
    "subdural": Code("35486000", "SCT", "Subdural intracranial hemorrhage"),
}
WORDS = {
    "any": "Any intracranial hemorrhage",
    **{name: name.capitalize() for name in list(CODES)[1:]},
}

OUTPUT = OutputSpec(
    algorithm="Vigil ICH",
    short_name="ICH AI",
    title="Intracranial hemorrhage - AI triage",
    procedure=Code("25045-6", "LN", "CT unspecified body region"),
    body_part="HEAD",
    laterality="",
    window_centre=40.0,
    window_width=80.0,
    image_word="slice",
    summary_series="AI ICH Summary - NOT FOR DIAGNOSIS",
    overlay_series="AI ICH Grad-CAM overlay",
    report_series="AI ICH Report (TID 1500)",
    key_series="AI ICH key images",
    map_series="AI ICH Grad-CAM map",
    attention_words="AI attention map - not a lesion outline",
    disclaimer="Research software; not a medical device. A radiologist must read every image.",
    conclusion_present="Suspicious for intracranial hemorrhage; prompt reading is suggested.",
    conclusion_absent="Intracranial hemorrhage was not detected; this does not rule it out.",
)
MODEL = ModelIdentity(
    bundle="ich",
    version="1.0.0",
    architecture="tf_efficientnet_lite0",
    weights_sha256="3f" * 32,
    calibration_id="temp-2026-07",
    aggregation="max",
    preprocessing="windows=40/80,80/200,600/2800; size=256; slab=5mm",
    numerics="fp32",
)
RESULT_UUID = "0d1f7f8e-7b53-4d61-9d2e-6f6a6d1c7a10"


def head_ct() -> list[Dataset]:
    """The real head CT without pixel data, in order along the normal; skips where it is absent."""
    paths = sorted(HEAD_CT.glob("*.dcm"))
    if not paths:
        pytest.skip(f"no head CT in {HEAD_CT}")
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    return sorted(headers, key=lambda header: float(header.ImagePositionPatient[2]))


def head_ct_pixels(sop_instance_uid: str) -> np.ndarray:
    """Rescaled values of one slice, float32, shape (rows, columns)."""
    for path in sorted(HEAD_CT.glob("*.dcm")):
        read = pydicom.dcmread(path)
        if read.SOPInstanceUID == sop_instance_uid:
            values = read.pixel_array.astype(np.float32)
            return values * float(read.RescaleSlope) + float(read.RescaleIntercept)
    raise LookupError("no such slice")


def synthetic_headers(n: int = 6, **changes: object) -> list[Dataset]:
    """Headers of an axial head CT of one made-up patient; `changes` go into each, None deletes."""
    study, series, frame = (f"2.25.{7000 + i}" for i in range(3))
    headers = []
    for index in range(n):
        header = Dataset()
        header.SpecificCharacterSet = "ISO_IR 100"
        header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, f"2.25.{8000 + index}"
        header.StudyInstanceUID, header.SeriesInstanceUID = study, series
        header.StudyDate, header.StudyTime, header.Modality = "20260301", "134500", "CT"
        header.AccessionNumber, header.StudyID = "A-77", "S1"
        header.PatientName, header.PatientID = "Built^For^Tests", "T-0001"
        header.PatientBirthDate, header.PatientSex = "19500101", "F"
        header.ReferringPhysicianName = "Nobody^Special"
        header.Manufacturer = "ACME"
        header.InstanceNumber = index + 1
        header.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        header.ImagePositionPatient = [-120, -120, 5 * index]
        header.PixelSpacing, header.SliceThickness = [0.9375, 0.9375], 5
        header.FrameOfReferenceUID, header.PositionReferenceIndicator = frame, ""
        header.SliceLocation = 5 * index
        header.Rows = header.Columns = 256
        header.PhotometricInterpretation = "MONOCHROME2"
        for keyword, value in changes.items():
            if value is None:
                del header[keyword]
            else:
                setattr(header, keyword, value)
        headers.append(header)
    return headers


def image_refs(headers: list[Dataset]) -> tuple[ImageRef, ...]:
    return tuple(
        ImageRef(
            instance_id=str(uuid.uuid5(uuid.NAMESPACE_OID, header.SOPInstanceUID)),
            sop_class_uid=str(header.SOPClassUID),
            sop_instance_uid=str(header.SOPInstanceUID),
            series_instance_uid=str(header.SeriesInstanceUID),
            frame=None,
            instance_number=int(header.InstanceNumber),
            position_mm=float(header.ImagePositionPatient[2]),
            rows=int(header.Rows),
            columns=int(header.Columns),
        )
        for header in headers
    )


def label_result(
    name: str,
    value: float,
    *,
    top: int,
    threshold: float = 0.35,
    exploratory: bool = False,
    prevalence: float = 0.1,
    reference: float | None = None,
) -> LabelResult:
    status = LabelStatus.EXPLORATORY if exploratory else LabelStatus.VALIDATED
    shown = CalibratedProbability(
        value=value,
        prevalence=prevalence,
        reference=value if reference is None else reference,
        lower_clip=0.02,
        upper_clip=0.98,
    )
    return LabelResult(
        label=name,
        words=WORDS[name],
        code=CODES[name],
        status=status,
        raw=RawScore(float(np.log(value / (1 - value)) * 1.5)),
        probability=None if exploratory else shown,
        threshold=None if exploratory else threshold,
        top_image=top,
    )


def make_finding(
    headers: list[Dataset],
    *,
    positive: bool = True,
    exploratory: tuple[str, ...] = ("intraventricular", "subdural"),
    keys: tuple[int, ...] = (1, 2, 3),
    **changes: object,
) -> Finding:
    """A whole finding over `headers`; `changes` replace its fields."""
    values = (
        (0.87, 0.08, 0.74, 0.31, 0.12, 0.22) if positive else (0.06, 0.02, 0.04, 0.11, 0.03, 0.05)
    )
    labels = tuple(
        label_result(name, value, top=keys[i % len(keys)], exploratory=name in exploratory)
        for i, (name, value) in enumerate(zip(CODES, values, strict=True))
    )
    key_images = tuple(
        KeyImage(
            image=index,
            label="any",
            raw=RawScore(2.0 - 0.5 * abs(place - 1)),
            region=Region(
                0.55 * headers[0].Columns,
                0.4 * headers[0].Rows,
                0.7 * headers[0].Columns,
                0.55 * headers[0].Rows,
            ),
        )
        for place, index in enumerate(keys)
    )
    fields: dict[str, object] = {
        "result_uuid": RESULT_UUID,
        "started_at": "2026-03-01T13:05:09+00:00",
        "model": MODEL,
        "images": image_refs(headers),
        "labels": labels,
        "image_logits": {name: tuple(0.1 * i for i in range(len(headers))) for name in CODES},
        "key_images": key_images if positive else (),
        "urgency": Urgency.STAT if positive else Urgency.ROUTINE,
        "output": OUTPUT,
        "map_scale": 4.0,
        "shows_regions": True,
    }
    return Finding(**{**fields, **changes})  # type: ignore[arg-type]


def make_maps(finding: Finding) -> dict[int, np.ndarray]:
    """Raw heat maps with one hot spot each, the middle one strongest."""
    maps = {}
    for index, key in enumerate(finding.key_images):
        image = finding.images[key.image]
        y, x = np.mgrid[: image.rows, : image.columns].astype(np.float32)
        centre = (0.47 * image.rows, 0.62 * image.columns)
        spread = 2 * (0.08 * image.rows) ** 2
        strength = finding.map_scale * (1.0 if index == 1 else 0.6)
        spot = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / spread)
        maps[index] = (strength * spot).astype(np.float32)
    return maps


def make_pixels(finding: Finding) -> dict[int, np.ndarray]:
    """A grey disc of 35 HU in air for each key image."""
    pixels = {}
    for key in finding.key_images:
        image = finding.images[key.image]
        y, x = np.mgrid[: image.rows, : image.columns]
        distance = np.hypot(y - image.rows / 2, x - image.columns / 2)
        pixels[key.image] = np.where(distance < 0.38 * image.rows, 35.0, -1000.0).astype(np.float32)
    return pixels


def by_index(headers: list[Dataset]) -> Mapping[int, Dataset]:
    return dict(enumerate(headers))
