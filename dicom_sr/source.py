"""The source images' headers, read in a sandboxed child and handed over small."""

import io
import warnings
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydicom import DataElement, Dataset, dcmread
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.errors import InvalidDicomError
from pydicom.filebase import DicomBytesIO
from pydicom.filereader import read_dataset
from pydicom.filewriter import write_dataset

from db.codestream import is_lossy
from db.errors import NotDicom, PermanentError
from db.lenient import text
from db.sandbox import Answer
from dicom_sr.attributes import COPIED, GEOMETRY, keep_bytes

#: Besides what is copied into every object.
WANTED = (
    *COPIED,
    *GEOMETRY,
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "PatientOrientation",
    "PhotometricInterpretation",
    "LossyImageCompression",
    "LossyImageCompressionRatio",
    "LossyImageCompressionMethod",
    "PlacerOrderNumberImagingServiceRequest",
    "FillerOrderNumberImagingServiceRequest",
    "RequestedProcedureID",
    "RequestedProcedureDescription",
)
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
#: A value longer than this is nobody's name or position.
MAX_VALUE_BYTES = 8192
MAX_HEADER_BYTES = 262144
#: VRs whose bytes are text in every transfer syntax, and so are handed over as they stand.
_TEXT_VRS = frozenset(
    {
        "AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI",
        "UR", "UT",
    }
)  # fmt: skip
# Whatever pydicom raises when a value is not what its VR says.
_BAD_VALUE = (
    ValueError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError,
    NotImplementedError, EOFError, OSError,
)  # fmt: skip


class HeaderTooLarge(PermanentError):
    """The attributes that results copy are larger than any patient's or study's ever are."""

    code: ClassVar[str] = "header_too_large"


def read_header(path: str, frame: int | None) -> Answer:
    """The wanted attributes of a stored instance, as Explicit VR Little Endian bytes.

    Runs in a child. The geometry of `frame` (from 1) of a multi-frame instance is lifted to the
    top, where that of a single-frame one stands.

    Raises
    ------
    NotDicom, HeaderTooLarge
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        groups = () if frame is None else _GROUPS
        tags = [tag for name in (*WANTED, *groups) if (tag := tag_for_keyword(name)) is not None]
        try:
            read = dcmread(path, stop_before_pixels=True, specific_tags=list(tags))
        except (InvalidDicomError, *_BAD_VALUE) as error:
            raise NotDicom(type(error).__name__) from None
        small = Dataset()
        for keyword in WANTED:
            element = _handed_over(read, keyword)
            if element is not None:
                small[element.tag] = element
        if is_lossy(text(small, "LossyImageCompression"), _syntax(read)):
            small.LossyImageCompression = "01"  # also where its encoder forgot to say so
        if frame is not None:
            _lift(read, small, frame)
        data = _encoded(small)
    return {}, [np.frombuffer(data, np.uint8)]


def _syntax(read: Dataset) -> str:
    return str(getattr(read.file_meta, "TransferSyntaxUID", ""))


def parsed(blob: NDArray[np.uint8]) -> Dataset:
    """The header that `read_header` handed over; its values are still as they stood in the file."""
    return read_dataset(io.BytesIO(blob.tobytes()), False, True)


def _handed_over(read: Dataset, keyword: str) -> DataElement | RawDataElement | None:
    element = read.get_item(keyword)
    if element is None:
        return None
    if isinstance(element, RawDataElement):
        vr = element.VR or dictionary_VR(element.tag)
        if vr in _TEXT_VRS:
            if element.value is None or len(element.value) > MAX_VALUE_BYTES:
                return None
            return element._replace(VR=vr, is_implicit_VR=False, is_little_endian=True)
    try:
        decoded = read[element.tag]
        if decoded.VR == "SQ":
            for item in decoded.value:
                list(item.iterall())  # decoded now: its encoding is not the one it is written in
        return decoded
    except _BAD_VALUE:
        return None


def _lift(read: Dataset, small: Dataset, frame: int) -> None:
    """Geometry of one frame, from its own functional groups before the shared ones."""
    items = []
    for name, index in ((_GROUPS[0], 0), (_GROUPS[1], frame - 1)):
        try:
            items.append(read[name].value[index])
        except _BAD_VALUE:
            continue
    for item in items:  # the frame's own come last and win
        for macro in item:
            if macro.VR == "SQ" and macro.value:
                for keyword in GEOMETRY:
                    if keyword in macro.value[0]:
                        small[keyword] = macro.value[0][keyword]


def _encoded(small: Dataset) -> bytes:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    try:
        keep_bytes(small)
        write_dataset(buffer, small)
    except _BAD_VALUE as error:
        raise NotDicom(type(error).__name__) from None
    data = buffer.getvalue()
    if len(data) > MAX_HEADER_BYTES:
        raise HeaderTooLarge(f"{len(data)} bytes, {MAX_HEADER_BYTES} at most")
    return data
