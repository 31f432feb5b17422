"""What intake must know of a spooled file, read in a sandboxed child: header, patient, digests.

A value that cannot be read is None or empty, as if absent: whether that matters is judged later, by
intake for identity and by a bundle's manifest for the rest. Nothing here runs in a process of ours.
"""

import datetime as dt
import hashlib
import io
import json
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_dataset, read_file_meta_info

from db.codestream import is_lossy
from db.errors import CutOff, NotDicom
from db.faults import point
from db.header import InstanceHeader
from db.lenient import BAD_VALUE, date, integer, number, numbers, text, texts
from db.meta import transfer_syntax
from db.pixel_digest import BIG_ENDIAN, PIXEL_TAGS, pixel_sha256
from db.sandbox import Answer

_IMPLICIT = frozenset({"1.2.840.10008.1.2", "1.2.840.113619.5.2"})
_DEFLATED = frozenset(
    {"1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"}
)
_DEFER_BYTES = 64 * 2**20  # per-frame groups are long; a longer value is none that we read
_CHUNK_BYTES = 2**16
_MAX_FRAMES = 100_000
_MAX_ELEMENTS = 100_000  # at the top; 64 MB of zeros, 60 kB deflated, are 8 million
_AGE = re.compile(r"(\d{3})([DWMY])")
_YEARS = {"D": 1 / 365.25, "W": 7 / 365.25, "M": 1 / 12, "Y": 1.0}
_TEXTS = {  # header field -> keyword
    "modality": "Modality",
    "body_part": "BodyPartExamined",
    "series_description": "SeriesDescription",
    "study_description": "StudyDescription",
    "protocol_name": "ProtocolName",
    "contrast_agent": "ContrastBolusAgent",
    "manufacturer": "Manufacturer",
    "model": "ManufacturerModelName",
    "photometric": "PhotometricInterpretation",
    "patient_position": "PatientPosition",
    "view_position": "ViewPosition",
    "sop_class_uid": "SOPClassUID",
    "sop_instance_uid": "SOPInstanceUID",
    "study_instance_uid": "StudyInstanceUID",
    "series_instance_uid": "SeriesInstanceUID",
    "frame_of_reference_uid": "FrameOfReferenceUID",
}
_INTEGERS = {
    "series_number": "SeriesNumber",
    "instance_number": "InstanceNumber",
    "acquisition_number": "AcquisitionNumber",
    "rows": "Rows",
    "columns": "Columns",
    "bits_allocated": "BitsAllocated",
    "bits_stored": "BitsStored",
    "pixel_representation": "PixelRepresentation",
    "samples_per_pixel": "SamplesPerPixel",
}
_PATIENT = {
    "patient_id": "PatientID",
    "issuer_of_patient_id": "IssuerOfPatientID",
    "patient_name": "PatientName",
    "patient_birth_date": "PatientBirthDate",
    "patient_sex": "PatientSex",
    "accession_number": "AccessionNumber",
    "study_date": "StudyDate",
    "study_time": "StudyTime",
    "study_description": "StudyDescription",
}
_OTHERS = [
    "ImageType", "ConvolutionKernel", "Laterality", "ImageLaterality", "RescaleType", "PatientAge",
    "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ImageOrientationPatient",
    "ImagePositionPatient", "PixelSpacing", "ImagerPixelSpacing", "SliceThickness",
    "GantryDetectorTilt", "LossyImageCompression", "ContributingEquipmentSequence",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip
_KEYWORDS = {*_TEXTS.values(), *_INTEGERS.values(), *_PATIENT.values(), *_OTHERS}
_TAGS = [tag for keyword in sorted(_KEYWORDS) if (tag := tag_for_keyword(keyword)) is not None]


def describe(path: str, may_be_cut: bool = False) -> Answer:
    """Read a spooled file; where its pixel data `may_be_cut`, they are passed over.

    Returns
    -------
    `header` (InstanceHeader), `patient` (the study row's fields), `pixel_sha256`,
    `identity_sha256` (of patient, UIDs, geometry and rescale), `is_ours`; no arrays.

    Raises
    ------
    NotDicom
        If no data set can be read.
    CutOff
        If one begins, and ends in the middle.
    """
    point("describe_begun")
    with warnings.catch_warnings(), _Reader(path) as file, _stated():
        warnings.simplefilter("ignore")
        syntax = transfer_syntax(file)
        _check_meta(path, file, syntax)
        body = _inflated(file) if syntax in _DEFLATED else file
        is_big = syntax == BIG_ENDIAN
        ds = _dataset(body, is_implicit=syntax in _IMPLICIT, is_big=is_big)
        is_implicit = bool(ds.original_encoding[0])
        swap = max(1, (integer(ds, "BitsAllocated") or 8) // 8)
        pixels = ""
        if not may_be_cut:
            pixels = pixel_sha256(body, is_implicit=is_implicit, is_big=is_big, swap=swap)
        header = _header(ds, syntax)
        patient = {name: text(ds, keyword) for name, keyword in _PATIENT.items()}
    return {
        "header": header.to_json(),
        "patient": patient,
        "pixel_sha256": pixels,
        "identity_sha256": _identity(ds, header, patient),
        "is_ours": _is_ours(ds),
    }, []


class _Reader(io.BufferedReader):
    """Makes room for no more than there is: any data set may claim a value of 4 GiB."""

    def __init__(self, path: str) -> None:
        super().__init__(io.FileIO(path))
        self._end = os.fstat(self.fileno()).st_size

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _CHUNK_BYTES:
            size = max(min(size, self._end - self.tell()), 0)
        return super().read(size)


@contextmanager
def _stated() -> Iterator[None]:
    """What pydicom raises for a data set that it cannot follow, in our words."""
    try:
        yield
    except RecursionError:  # it reads sequences in sequences so: about 150 levels
        raise NotDicom("its sequences are nested too deeply") from None
    except OSError as error:
        if error.errno is not None:
            raise  # the disk's
        raise CutOff("the data set is cut off") from None
    except EOFError:
        raise CutOff("the data set is cut off") from None


def _check_meta(path: str, file: BinaryIO, syntax: str) -> None:
    """Refuse a data set with a file meta group of its own, where that names another syntax.

    It stands in files alone (PS3.10 7.1), yet some send it; pydicom would take its word for ours.
    """
    start = file.tell()
    if file.read(2) == b"\x02\x00":
        with suppress(InvalidDicomError, *BAD_VALUE):
            if str(read_file_meta_info(path).TransferSyntaxUID) == syntax:
                file.seek(start)
                return
        raise NotDicom("it holds a file header that is not the one it was sent under")
    file.seek(start)


def _inflated(file: BinaryIO) -> BinaryIO:
    """The whole data set; how large it grows is limited by this process's address space."""
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = io.BytesIO()
    try:
        while chunk := file.read(_CHUNK_BYTES):
            plain.write(inflate.decompress(chunk))
    except zlib.error:
        raise NotDicom("the deflated data set is broken") from None
    plain.seek(0)
    return plain


def _dataset(file: BinaryIO, *, is_implicit: bool, is_big: bool) -> Dataset:
    """The attributes we read; leaves `file` at the pixel data or at its end."""
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    ds = read_dataset(
        file,
        is_implicit,
        not is_big,
        stop_when=_Stop(),
        defer_size=_DEFER_BYTES,
        specific_tags=_TAGS,
    )
    tags = list(ds.keys())  # iterating over the data set itself would convert its values
    # First, since any text reads as an element that is longer than the file.
    if not any(
        text(ds, keyword) for keyword in ("SOPInstanceUID", "StudyInstanceUID", "PatientID")
    ):
        raise NotDicom("it holds no UID and no patient, so it is no DICOM data set")
    if file.tell() > size or any(_is_cut(ds.get_item(tag)) for tag in tags):
        raise CutOff("the data set is cut off")
    return ds


class _Stop:
    """At the pixel data; and at so many elements that reading goes on for minutes."""

    def __init__(self) -> None:
        self._n = 0

    def __call__(self, tag: int, vr: str | None, length: int) -> bool:
        self._n += 1
        if self._n > _MAX_ELEMENTS:
            raise NotDicom(f"it has more than {_MAX_ELEMENTS} elements")
        return int(tag) in PIXEL_TAGS


def _is_cut(element: Any) -> bool:
    if not isinstance(element, RawDataElement) or element.value is None:
        return False
    return element.length != 0xFFFFFFFF and len(element.value) < element.length


def _header(ds: Dataset, syntax: str) -> InstanceHeader:
    words = {field: text(ds, keyword) for field, keyword in _TEXTS.items()}
    counts = {field: integer(ds, keyword) for field, keyword in _INTEGERS.items()}
    patient_dates = date(ds, "PatientBirthDate"), date(ds, "StudyDate")
    spacing = numbers(ds, "PixelSpacing", 2) or numbers(ds, "ImagerPixelSpacing", 2)
    frames = integer(ds, "NumberOfFrames")
    return InstanceHeader(
        **words,  # type: ignore[arg-type]  # one value type per table
        **counts,  # type: ignore[arg-type]
        transfer_syntax_uid=syntax,
        image_type=tuple(texts(ds, "ImageType")),
        kernel="\\".join(texts(ds, "ConvolutionKernel")),
        laterality=text(ds, "ImageLaterality") or text(ds, "Laterality"),
        study_date=patient_dates[1],
        patient_age_years=_age_years(text(ds, "PatientAge"), *patient_dates),
        frames=frames if frames is not None and frames > 0 else 1,
        rescale_slope=number(ds, "RescaleSlope"),
        rescale_intercept=number(ds, "RescaleIntercept"),
        rescale_type=text(ds, "RescaleType"),
        orientation=numbers(ds, "ImageOrientationPatient", 6),
        position=numbers(ds, "ImagePositionPatient", 3) if "ImagePositionPatient" in ds else None,
        pixel_spacing=spacing,
        slice_thickness=number(ds, "SliceThickness"),
        gantry_tilt=number(ds, "GantryDetectorTilt"),
        is_lossy=is_lossy(text(ds, "LossyImageCompression"), syntax),
    )


def _age_years(age: str, birth: str, study: str) -> float | None:
    if match := _AGE.fullmatch(age):
        return int(match[1]) * _YEARS[match[2]]
    if birth and study:
        born, seen = dt.date.fromisoformat(birth), dt.date.fromisoformat(study)
        return (seen - born).days / 365.25 if seen >= born else None
    return None


def _is_ours(ds: Dataset) -> bool:
    """Our results say so twice: who made the object, and what software contributed."""
    if text(ds, "Manufacturer") != "Vigil":
        return False
    with suppress(*BAD_VALUE):
        return any(
            text(item, "Manufacturer") == "Vigil" and text(item, "DeviceUID").startswith("2.25.")
            for item in ds["ContributingEquipmentSequence"].value
        )
    return False


def _identity(ds: Dataset, header: InstanceHeader, patient: dict[str, str]) -> str:
    """A digest of all that may not differ between two instances of one UID."""
    name = patient["patient_name"].rstrip("^= ")
    who = [
        patient[key]
        for key in ("patient_id", "issuer_of_patient_id", "patient_birth_date", "patient_sex")
    ]
    uids = [
        header.sop_class_uid, header.sop_instance_uid, header.study_instance_uid,
        header.series_instance_uid, header.frame_of_reference_uid,
    ]  # fmt: skip
    geometry = [
        header.rows, header.columns, header.frames, header.bits_stored, header.pixel_representation,
        header.orientation, header.position, header.pixel_spacing, header.slice_thickness,
        header.gantry_tilt, header.patient_position, header.laterality,
    ]  # fmt: skip
    rescale = [header.rescale_slope, header.rescale_intercept, header.rescale_type]
    whole = [name, *who, *uids, *geometry, *rescale, _frames(ds)]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _frames(ds: Dataset) -> list[list[Any]]:
    """Geometry and rescale of each frame of an enhanced object; empty for all others."""
    with suppress(*BAD_VALUE):
        groups = ds["PerFrameFunctionalGroupsSequence"].value
        return [_frame(frame) for frame in groups[:_MAX_FRAMES]]
    return []


def _frame(frame: Dataset) -> list[Any]:
    found: list[Any] = []
    for macro in frame:
        if macro.VR != "SQ" or not macro.value:
            continue
        item = macro.value[0]
        found += [
            numbers(item, "ImagePositionPatient", 3), numbers(item, "ImageOrientationPatient", 6),
            numbers(item, "PixelSpacing", 2), numbers(item, "RescaleSlope", 1),
            numbers(item, "RescaleIntercept", 1),
        ]  # fmt: skip
    return found
