"""What results copy from their source: characters, gaps and rubbish (H9, H29, H30, H31)."""

import datetime as dt
import io
import warnings
from pathlib import Path

import pydicom
import pytest
from pydicom import Dataset
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from db.errors import NotDicom
from dicom_sr.build import BuiltObject, build_objects
from dicom_sr.plan import Context, Variant
from dicom_sr.source import HeaderTooLarge, parsed, read_header
from tests.findings import make_finding, synthetic_headers

CONTEXT = Context("north", 1, "0.1.0", "vigil-1")
NEGATIVE = {"roles": ("summary", "sr")}


@pytest.fixture(autouse=True)
def _misspelt_keywords_are_errors(monkeypatch):
    monkeypatch.setattr(pydicom.config, "INVALID_KEYWORD_BEHAVIOR", "RAISE")


def stored(header: Dataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    """Write a header as a file in a transfer syntax; whatever its values are."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID
    header.file_meta = meta
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(path, header, enforce_file_format=True)
    return path


def raw(keyword: str, value: bytes) -> RawDataElement:
    """An element as it stands in a file, whatever is in it."""
    tag = Tag(tag_for_keyword(keyword))
    return RawDataElement(tag, dictionary_VR(tag), len(value), value, 0, False, True)


def results(header: Dataset, tmp_path: Path, syntax: str = ExplicitVRLittleEndian) -> list[Dataset]:
    """Negative results over one source file, read the way the node reads it."""
    path = stored(header, tmp_path / "source.dcm", syntax)
    _, (blob,) = read_header(str(path), None)
    return [opened(built) for built in built_from(parsed(blob))]


def built_from(header: Dataset) -> list[BuiltObject]:
    finding = make_finding(synthetic_headers(1), positive=False, keys=(0,))
    with warnings.catch_warnings():
        # As `vigil deliver` runs: what the source's values are worth is for our own rules.
        warnings.simplefilter("ignore")
        return build_objects(finding, {0: header}, {}, {}, CONTEXT, Variant(**NEGATIVE))


def opened(built: BuiltObject) -> Dataset:
    return pydicom.dcmread(io.BytesIO(built.data))


NAMES = {
    "latin": (["ISO_IR 100"], "Müller^Jürgen"),
    "utf8": (["ISO_IR 192"], "Ωmega^王^Łukasz"),
    "cyrillic": (["ISO_IR 144"], "Люкceмбypг"),
    "arabic": (["ISO_IR 127"], "قباني^لنزار"),
    "greek": (["ISO_IR 126"], "Διονυσιος"),
    "hebrew": (["ISO_IR 138"], "שרון^דבורה"),
    "gb18030": (["GB18030"], "Wang^XiaoDong=王^小东"),
    "japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    "half-width": (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎"),
    "korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    "mixed": (["ISO 2022 IR 100", "ISO 2022 IR 144"], "Dionisiy^Люк"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_h9_names_keep_their_characters(tmp_path, name, syntax):
    charset, person = NAMES[name]
    (header,) = synthetic_headers(1, SpecificCharacterSet=charset, PatientName=person)

    built = results(header, tmp_path, syntax)

    assert len(built) == 2
    for one in built:
        assert str(one.PatientName) == person
        found = one.SpecificCharacterSet
        assert ([found] if isinstance(found, str) else list(found)) == charset


def test_h9_gb2312_keeps_its_bytes(tmp_path):
    # PS3.5 K.2; pydicom reads these escapes and does not write them.
    name = b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab= "
    (header,) = synthetic_headers(1, SpecificCharacterSet=["", "ISO 2022 IR 58"])
    header.PatientName = "X" * len(name)
    path = stored(header, tmp_path / "source.dcm")
    path.write_bytes(path.read_bytes().replace(b"X" * len(name), name))

    _, (blob,) = read_header(str(path), None)

    for built in built_from(parsed(blob)):
        assert name in built.data


def test_h9_undeclared_latin_bytes_are_declared(tmp_path):
    (header,) = synthetic_headers(1, SpecificCharacterSet=None)
    header[0x00100010] = raw("PatientName", "Müller^J".encode("latin-1"))

    for built in results(header, tmp_path):
        assert built.SpecificCharacterSet == "ISO_IR 100"
        assert str(built.PatientName) == "Müller^J"


@pytest.mark.parametrize("charset", ["FOO", "ISO-IR 100", ["FOO", "BAR"], ["ISO_IR 192", "x"]])
def test_an_unknown_character_set_loses_no_result(tmp_path, charset):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about the header that this test makes
        (header,) = synthetic_headers(1, SpecificCharacterSet=charset)
        path = stored(header, tmp_path / "source.dcm")
        _, (blob,) = read_header(str(path), None)

        assert len(built_from(parsed(blob))) == 2


def test_an_ascii_source_without_character_set_stays_so(tmp_path):
    (header,) = synthetic_headers(1, SpecificCharacterSet=None)

    for built in results(header, tmp_path):
        assert "SpecificCharacterSet" not in built


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        DeflatedExplicitVRLittleEndian,
    ],
)
def test_a_header_is_the_same_from_every_transfer_syntax(tmp_path, syntax):
    (header,) = synthetic_headers(1)
    other_id = Dataset()
    other_id.PatientID, other_id.TypeOfPatientID = "OLD-7", "TEXT"
    header.OtherPatientIDsSequence = [other_id]

    path = stored(header, tmp_path / "source.dcm", syntax)
    _, (blob,) = read_header(str(path), None)

    read = parsed(blob)
    for keyword in ("PatientName", "PatientID", "ImagePositionPatient", "StudyInstanceUID"):
        assert read[keyword].value == header[keyword].value
    assert read.OtherPatientIDsSequence[0].PatientID == "OLD-7"


@pytest.mark.parametrize(
    "gap",
    ["StudyID", "AccessionNumber", "PatientBirthDate", "PatientSex", "StudyTime", "StudyDate"],
)
def test_h31_a_gap_in_the_source_is_a_blank_in_the_result(tmp_path, gap):
    (header,) = synthetic_headers(1, **{gap: None})

    for built in results(header, tmp_path):
        assert built[gap].is_empty


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("PatientSex", "U"),
        ("PatientSex", "female"),
        ("PatientBirthDate", "19991399"),
        ("PatientBirthDate", "01.02.1950"),
        ("StudyDate", "2026"),
        ("StudyTime", "25:61"),
    ],
)
def test_h31_a_value_that_cannot_be_is_left_blank(tmp_path, keyword, value):
    (header,) = synthetic_headers(1)
    header[keyword] = raw(keyword, value.encode())

    for built in results(header, tmp_path):
        assert built[keyword].is_empty


def test_identity_is_copied_as_it_is_however_odd(tmp_path):
    (header,) = synthetic_headers(1)
    header[0x00100020] = raw("PatientID", b"ID-" + b"9" * 81)  # a LO has 64 at most

    for built in results(header, tmp_path):
        assert built.get_item("PatientID").value == b"ID-" + b"9" * 81


def test_times_are_local_where_the_source_says_where(tmp_path):
    (header,) = synthetic_headers(1, TimezoneOffsetFromUTC="-0500")

    for built in results(header, tmp_path):
        assert built.TimezoneOffsetFromUTC == "-0500"
        assert (built.ContentDate, built.ContentTime) == ("20260301", "080509")


def test_without_a_stated_zone_none_is_written():
    (header,) = synthetic_headers(1)
    finding = make_finding(synthetic_headers(1), positive=False, keys=(0,))
    berlin = Context("north", 1, "0.1.0", "vigil-1", zone=dt.timezone(dt.timedelta(hours=1)))

    for built in build_objects(finding, {0: header}, {}, {}, berlin, Variant(**NEGATIVE)):
        assert "TimezoneOffsetFromUTC" not in opened(built)
        assert opened(built).ContentTime == "140509"


def test_what_was_asked_for_stands_in_the_report(tmp_path):
    (header,) = synthetic_headers(
        1, RequestedProcedureID="RP1", PlacerOrderNumberImagingServiceRequest="PO-9"
    )

    report = results(header, tmp_path)[1]

    (request,) = report.ReferencedRequestSequence
    assert request.AccessionNumber == "A-77"
    assert request.RequestedProcedureID == "RP1"
    assert request.PlacerOrderNumberImagingServiceRequest == "PO-9"
    assert request["FillerOrderNumberImagingServiceRequest"].is_empty


def test_h30_the_geometry_of_a_frame_is_lifted_to_the_top(tmp_path):
    (header,) = synthetic_headers(1, ImagePositionPatient=None, PixelSpacing=None)
    shared, spacing = Dataset(), Dataset()
    spacing.PixelSpacing, spacing.SliceThickness = [0.5, 0.5], 3
    shared.PixelMeasuresSequence = [spacing]
    frames = []
    for z in (10, 20):
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, z]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    header.SharedFunctionalGroupsSequence = [shared]
    header.PerFrameFunctionalGroupsSequence = frames
    path = stored(header, tmp_path / "source.dcm")

    _, (blob,) = read_header(str(path), 2)

    read = parsed(blob)
    assert list(read.ImagePositionPatient) == [0, 0, 20]
    assert list(read.PixelSpacing) == [0.5, 0.5]
    assert "PerFrameFunctionalGroupsSequence" not in read


def test_rubbish_is_no_header(tmp_path):
    path = tmp_path / "source.dcm"
    path.write_bytes(b"\x7fELF" + bytes(1000))

    with pytest.raises(NotDicom):
        read_header(str(path), None)


def test_a_header_of_megabytes_is_refused(tmp_path):
    (header,) = synthetic_headers(1)
    item = Dataset()
    item.PatientID = "X" * 64
    header.OtherPatientIDsSequence = [item] * 5000
    path = stored(header, tmp_path / "source.dcm")

    with pytest.raises(HeaderTooLarge):
        read_header(str(path), None)
