"""Our objects before other people's validators, over a real head CT (DICOM_OUTPUT 8)."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydicom.uid import MultiFrameTrueColorSecondaryCaptureImageStorage

from dicom_sr.build import build_objects
from dicom_sr.plan import SR_CLASSES, Context, ReportReference, Variant
from tests.findings import (
    by_index,
    head_ct,
    head_ct_pixels,
    make_finding,
    make_maps,
    make_pixels,
    synthetic_headers,
)
from tests.validators import dciodvfy, dsrdump, pixelmed

CONTEXT = Context("north", 1, "0.1.0", "vigil-1")
KEYS = (12, 14, 16)
IODS = {
    "summary": "SCImage",
    "overlay": "SCImage",
    "ko": "KeyObjectSelectionDocument",
}
STACK_IODS = {str(MultiFrameTrueColorSecondaryCaptureImageStorage): "MultiframeTrueColorSCImage"}
SR_IODS = dict(
    zip(SR_CLASSES.values(), ("Comprehensive3DSR", "ComprehensiveSR", "EnhancedSR"), strict=True)
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> dict[str, Path]:
    """A positive, a negative, a partial second revision, and results over a source full of gaps."""
    folder = tmp_path_factory.mktemp("objects")
    headers = head_ct()
    finding = make_finding(headers, keys=KEYS)
    pixels = {
        key.image: head_ct_pixels(finding.images[key.image].sop_instance_uid)
        for key in finding.key_images
    }
    old = ReportReference(SR_CLASSES["3d"], "2.25.1", "2.25.2", headers[0].StudyInstanceUID)
    second = replace(finding, is_partial=True, notes=("Steps of 4 and 7 mm in one series",))
    gappy = synthetic_headers(
        StudyID=None, AccessionNumber=None, PatientBirthDate=None, PatientSex=None,
        StudyTime=None, StudyDate=None, ReferringPhysicianName=None,
    )  # fmt: skip
    over_gaps = make_finding(gappy)
    negative = make_finding(headers, positive=False, keys=KEYS)
    every_class = Variant(sr_classes=tuple(SR_CLASSES.values()))
    built = {
        "positive": (finding, headers, pixels, CONTEXT, every_class),
        "negative": (negative, headers, {}, CONTEXT, Variant()),
        "revision": (
            second, headers, pixels, replace(CONTEXT, result_no=2),
            Variant(
                predecessors=(old,), earlier_result=finding.started_at, is_rle=True,
                anchors_groups=False,
            ),
        ),
        "gaps": (over_gaps, gappy, make_pixels(over_gaps), CONTEXT, Variant()),
        "stack": (finding, headers, pixels, CONTEXT, Variant(is_stacked=True)),
    }  # fmt: skip
    paths = {}
    for name, (what, source, values, context, variant) in built.items():
        for one in build_objects(what, by_index(source), values, make_maps(what), context, variant):
            path = folder / f"{name}_{one.seq}_{one.role}_{one.sop_class_uid}.dcm"
            path.write_bytes(one.data)
            paths[path.stem] = path
    return paths


def test_dciodvfy_finds_no_error(objects):
    for name, path in objects.items():
        _, _, role, sop_class = name.split("_")
        iod = STACK_IODS.get(sop_class) or IODS.get(role) or SR_IODS[sop_class]
        assert dciodvfy(path, iod=iod) == [], name


def test_dcmtk_reads_every_document(objects):
    for name, path in objects.items():
        if name.split("_")[2] in ("sr", "ko"):
            assert "SEPARATE" in dsrdump(path), name


@pytest.mark.timeout(600)
def test_pixelmed_finds_the_templates_and_no_error(objects):
    reports = [
        path
        for name, path in objects.items()
        if name.split("_")[2:] == ["sr", SR_CLASSES["3d"]] and not name.startswith("gaps")
    ]

    verdicts = pixelmed(reports, iod="Comprehensive3DSR", template="TID_1500 (MeasurementReport)")

    assert len(verdicts) == 4
    assert {path.stem: lines for path, lines in verdicts.items() if lines} == {}


@pytest.mark.timeout(600)
def test_pixelmed_finds_the_key_object_template(objects):
    keys = [
        path
        for name, path in objects.items()
        if name.startswith(("positive", "stack")) and "_ko_" in name
    ]

    verdicts = pixelmed(
        keys, iod="KeyObjectSelectionDocument", template="TID_2010 (KeyObjectSelection)"
    )

    assert verdicts == {path: [] for path in keys}
    assert len(keys) == 2


def test_the_validators_would_notice(objects, tmp_path):
    """A report that lost its flag: proof that silence means something."""
    import pydicom

    path = next(path for name, path in objects.items() if name.startswith("negative_2_sr"))
    broken = pydicom.dcmread(path)
    del broken.CompletionFlag
    broken.save_as(tmp_path / "broken.dcm")

    assert dciodvfy(tmp_path / "broken.dcm", iod="Comprehensive3DSR")
