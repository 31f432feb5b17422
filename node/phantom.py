"""Synthetic studies whose truth is known, as CT data sets a scanner might have sent.

They are for the demo, `vigil doctor`, `vigil bench` and the tests. Nothing in here comes from a
person; every name begins with PHANTOM. The same specification always makes the same bytes.
"""

import datetime as dt
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from scipy.ndimage import gaussian_filter

from node import anatomy

NAMESPACE = uuid.UUID("6f1d3c0a-5a52-4d0e-9a0c-0d5b6a7f1c21")
IMPLEMENTATION_UID = UID("2.25.148000117170927461146470158105310410785")
RESCALE_INTERCEPT = -1024
FIELD_OF_VIEW_MM = {"HEAD": 250.0, "CHEST": 400.0}
NOISE_HU = {"HEAD": 4.5, "CHEST": 12.0}
SHARP_NOISE = 4.0  # a bone kernel shows this many times the noise of a soft one
SUBSLICES = 3  # partial volume: each slice is the mean of this many planes


class Kind(StrEnum):
    PLAIN = "plain"  # a head in which nothing stands out
    LESION = "lesion"  # the same with a large dense collection under the skull, and its marks
    CHEST = "chest"  # another body part
    CONTRAST = "contrast"  # a head with bright vessels and a contrast agent
    LOCALISER = "localiser"  # nothing but the planning view


@dataclass(frozen=True, slots=True, kw_only=True)
class Phantom:
    """What to make. `seed` decides anatomy, noise and UIDs; `salt` only the UIDs."""

    kind: Kind = Kind.PLAIN
    seed: int = 1
    salt: str = ""
    patient_name: str = ""  # default: PHANTOM^<KIND>
    patient_id: str = ""  # default: PHANTOM-<KIND>-<seed>
    accession: str = ""
    taken_at: dt.datetime = dt.datetime(2026, 3, 1, 9, 30, tzinfo=dt.UTC)
    matrix: int = 512  # rows and columns
    thickness_mm: float = 5.0
    step_mm: float = 5.0  # table travel between slices
    slices: int = 30
    tilt_deg: float = 0.0  # gantry tilt
    kernel: str = "H31s"
    skip: frozenset[int] = frozenset()  # slices left out, 0 is the lowest
    localiser: bool = True
    bone: bool = False  # a second series with a sharp kernel
    thin: bool = False  # a second series of 1.25 mm slices

    def __post_init__(self) -> None:
        if self.slices < 1 or self.matrix < 16 or min(self.thickness_mm, self.step_mm) <= 0:
            raise ValueError(
                "a phantom needs slices, a matrix of 16 or more, and positive sizes in mm"
            )

    @property
    def body_part(self) -> str:
        return "CHEST" if self.kind is Kind.CHEST else "HEAD"

    def uid(self, *role: object) -> UID:
        """A UID that follows from the specification and `role` (PS3.5 B.2)."""
        text = "|".join(map(str, (self.kind, self.seed, self.salt, self.patient_id, *role)))
        return UID(f"2.25.{uuid.uuid5(NAMESPACE, text).int}")


@dataclass(frozen=True, slots=True)
class _Series:
    number: int
    description: str
    kernel: str
    thickness_mm: float
    step_mm: float
    slices: int
    is_sharp: bool = False


def study(phantom: Phantom) -> list[Dataset]:
    """Every instance of the study, in the order in which a scanner would send it.

    Each data set has its file meta group and can be written with `save_as`.
    """
    return list(instances(phantom))


def instances(phantom: Phantom) -> Iterator[Dataset]:
    """`study`, one data set at a time."""
    if phantom.localiser or phantom.kind is Kind.LOCALISER:
        yield _localiser(phantom)
    if phantom.kind is Kind.LOCALISER:
        return
    for series in _series(phantom):
        for index in range(series.slices):
            if index not in phantom.skip:
                yield _slice(phantom, series, index)


def write(datasets: Iterable[Dataset], folder: Path) -> list[Path]:
    """Save as DICOM files in `folder`, which is made; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, dataset in enumerate(datasets, 1):
        path = folder / f"{number:05d}.dcm"
        dataset.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def _series(phantom: Phantom) -> list[_Series]:
    words = {Kind.CONTRAST: "HEAD CTA", Kind.CHEST: "CHEST"}.get(phantom.kind, "HEAD")
    main = _Series(
        2, f"{words} {phantom.thickness_mm:g} mm {phantom.kernel}", phantom.kernel,
        phantom.thickness_mm, phantom.step_mm, phantom.slices,
    )  # fmt: skip
    chosen = [main]
    if phantom.bone:
        chosen.append(
            _Series(
                3, f"{words} BONE H60s", "H60s", main.thickness_mm, main.step_mm, main.slices, True
            )
        )
    if phantom.thin:
        count = round(main.slices * main.step_mm / 1.25)
        chosen.append(
            _Series(4, f"{words} 1.25 mm {phantom.kernel}", phantom.kernel, 1.25, 1.25, count)
        )
    return chosen


def _body(phantom: Phantom) -> anatomy.Body:
    if phantom.kind is Kind.CHEST:
        return anatomy.chest(phantom.seed)
    return anatomy.head(
        phantom.seed,
        lesion=phantom.kind is Kind.LESION,
        contrast=phantom.kind is Kind.CONTRAST,
    )


def _slice(phantom: Phantom, series: _Series, index: int) -> Dataset:
    tilt = np.deg2rad(phantom.tilt_deg)
    spacing = FIELD_OF_VIEW_MM[phantom.body_part] / phantom.matrix
    middle = 0.0 if phantom.kind is Kind.CHEST else -4.0  # from the skull base to the crown
    z = middle + (index - (series.slices - 1) / 2) * series.step_mm
    edge = -spacing * (phantom.matrix - 1) / 2
    # The gantry tilts about the x axis; the table still travels along z.
    position = (edge, edge * np.cos(tilt), z + edge * np.sin(tilt))
    hu = _pixels(phantom, series, index, z)
    dataset = _image(phantom, series.number, index + 1, hu)
    dataset.SeriesDescription = series.description
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.ConvolutionKernel = series.kernel
    dataset.SliceThickness = f"{series.thickness_mm:g}"
    dataset.GantryDetectorTilt = f"{phantom.tilt_deg:g}"
    dataset.PixelSpacing = [f"{spacing:.6f}"] * 2
    dataset.ImagePositionPatient = [f"{value:.4f}" for value in position]
    cosines = (1, 0, 0, 0, np.cos(tilt), np.sin(tilt))
    dataset.ImageOrientationPatient = [f"{value:.8g}" for value in cosines]
    if phantom.kind is Kind.CONTRAST:
        dataset.ContrastBolusAgent = "IOHEXOL 350"
    return dataset


def _pixels(phantom: Phantom, series: _Series, index: int, z: float) -> NDArray[np.float32]:
    """Hounsfield units, shape (rows, cols): the body, the couch under it, and noise."""
    body = _body(phantom)
    spacing = FIELD_OF_VIEW_MM[phantom.body_part] / phantom.matrix
    line = ((np.arange(phantom.matrix) - (phantom.matrix - 1) / 2) * spacing).astype(np.float32)
    v, x = np.meshgrid(line, line, indexing="ij")
    tilt = np.deg2rad(phantom.tilt_deg)
    planes = (np.arange(SUBSLICES) - (SUBSLICES - 1) / 2) * series.thickness_mm / SUBSLICES
    if tilt:  # the slab's thickness is measured along its normal (0, -sin, cos)
        sin, cos = np.sin(tilt), np.cos(tilt)
        parts = [body.sample(x, v * cos - d * sin, z + v * sin + d * cos) for d in planes]
        hu = np.mean(parts, axis=0)
    else:
        hu = body.level(x, v, (z + planes).astype(np.float32))
    if phantom.body_part == "HEAD":
        hu[(np.abs(np.hypot(x, v + 30) - 148) < 1.2) & (v > 60)] = 150.0  # head rest
    random = np.random.default_rng([phantom.seed, series.number, index])
    noise = gaussian_filter(random.standard_normal(hu.shape), 0.35 if series.is_sharp else 0.8)
    strength = NOISE_HU[phantom.body_part] * (SHARP_NOISE if series.is_sharp else 1.0)
    strength *= np.sqrt(5.0 / series.thickness_mm)  # fewer photons in a thinner slice
    return np.asarray(hu + noise / noise.std() * strength, dtype=np.float32)


def _localiser(phantom: Phantom) -> Dataset:
    """A lateral planning view: attenuation summed from side to side."""
    body = _body(phantom)
    rays = np.clip(body.hu + 1000, 0, None).mean(axis=2)[::-1]  # (z from the top, y)
    dataset = _image(phantom, 1, 1, np.asarray(rays * 1.2 - 1000, dtype=np.float32))
    rows = rays.shape[0]
    dataset.SeriesDescription = "SCOUT LATERAL"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dataset.ConvolutionKernel = "T20s"
    dataset.RescaleType = "US"  # summed attenuation, not Hounsfield units
    dataset.SliceThickness = "1"
    dataset.PixelSpacing = ["1", "1"]
    low = body.lowest
    dataset.ImagePositionPatient = ["0", f"{low[1]:g}", f"{low[0] + rows - 1:g}"]
    dataset.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]
    return dataset


def _image(phantom: Phantom, series: int, number: int, hu: NDArray[np.float32]) -> Dataset:
    """One CT image (PS3.3 A.3) without what differs between series."""
    dataset = _study_attributes(phantom)
    dataset.SOPInstanceUID = phantom.uid("image", series, number)
    dataset.SeriesInstanceUID = phantom.uid("series", series)
    dataset.SeriesNumber = series
    dataset.InstanceNumber = number
    dataset.AcquisitionNumber = 1
    stored = np.clip(np.rint(hu - RESCALE_INTERCEPT), 0, 4095).astype("<u2")
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.Rows, dataset.Columns = stored.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = 0
    dataset.RescaleIntercept, dataset.RescaleSlope = RESCALE_INTERCEPT, 1
    dataset.RescaleType = "HU"
    dataset.WindowCenter, dataset.WindowWidth = 40, 80
    dataset.PixelData = stored.tobytes()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = UID(dataset.SOPInstanceUID)
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.ImplementationClassUID = IMPLEMENTATION_UID
    dataset.file_meta.ImplementationVersionName = "VIGIL PHANTOM"
    return dataset


def _study_attributes(phantom: Phantom) -> Dataset:
    """Patient, study, series and equipment: what all images of the study share."""
    kind = phantom.kind.upper()
    date, time = f"{phantom.taken_at:%Y%m%d}", f"{phantom.taken_at:%H%M%S}"
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = CTImageStorage
    dataset.StudyDate = dataset.SeriesDate = dataset.AcquisitionDate = dataset.ContentDate = date
    dataset.StudyTime = dataset.SeriesTime = dataset.AcquisitionTime = dataset.ContentTime = time
    dataset.AccessionNumber = phantom.accession or f"PH{phantom.seed:05d}"
    dataset.Modality = "CT"
    dataset.Manufacturer, dataset.ManufacturerModelName = "SYNTHETIC", "Solid bodies"
    dataset.DeviceSerialNumber, dataset.SoftwareVersions = "1", "1"
    dataset.ReferringPhysicianName = ""
    dataset.StudyDescription = f"CT {phantom.body_part}"
    dataset.PatientName = phantom.patient_name or f"PHANTOM^{kind}"
    dataset.PatientID = phantom.patient_id or f"PHANTOM-{kind}-{phantom.seed}"
    dataset.PatientBirthDate, dataset.PatientSex, dataset.PatientAge = "19600101", "O", "066Y"
    dataset.BodyPartExamined = phantom.body_part
    dataset.KVP, dataset.PatientPosition = "120", "HFS"
    dataset.StudyInstanceUID = phantom.uid("study")
    dataset.StudyID = str(phantom.seed)
    dataset.FrameOfReferenceUID = phantom.uid("frame")
    dataset.PositionReferenceIndicator = ""
    return dataset
