"""Which attributes of a source image end up in results, and that they do so byte for byte."""

from pydicom import Dataset
from pydicom.charset import convert_encodings, default_encoding
from pydicom.filewriter import correct_ambiguous_vr

#: Copied byte for byte, so that a name keeps its characters whatever its character set.
COPIED = (
    "SpecificCharacterSet",
    "TimezoneOffsetFromUTC",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
    "StudyDescription",
    "PatientName",
    "PatientID",
    "IssuerOfPatientID",
    "PatientBirthDate",
    "PatientSex",
    "OtherPatientIDsSequence",
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "StudyInstanceUID",
    "StudyID",
)
#: Copied to an overlay from its slice: it lies exactly on it.
GEOMETRY = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SliceLocation",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
)


def keep_bytes(dataset: Dataset) -> None:
    """Have values that came as bytes written as these bytes, in Explicit VR Little Endian.

    Otherwise pydicom decodes and encodes them again, and not every character set survives that:
    it drops the escapes of ISO 2022 IR 58, say. Call it last, before writing.
    """
    correct_ambiguous_vr(dataset, True)  # what writing would do, were the encoding another one
    stated = dataset.get("SpecificCharacterSet")
    encodings = convert_encodings(stated) if stated else default_encoding
    dataset.set_original_encoding(False, True, encodings)
