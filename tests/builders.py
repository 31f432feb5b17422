"""Studies for tests: phantoms, the ways in which they arrive broken, and de-windowed real heads."""

import copy
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.uid import UID, RLELossless

from node.phantom import Kind, Phantom, instances, study

DATA = Path(os.environ.get("VIGIL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

# ct-ich's grey values: 0..255 over the brain window, level 40 HU and width 120 HU.
CTICH_LEVEL_HU, CTICH_WIDTH_HU = 40.0, 120.0
CTICH_STEP_MM = 5.0
CTICH_PIXEL_MM = 0.4  # an estimate from adult skulls 150 mm wide: the set does not state it


def ct_series(
    kind: Kind | str = Kind.PLAIN, *, slices: int = 6, matrix: int = 64, **options: Any
) -> list[Dataset]:
    """A small axial series without a localiser; `options` are those of `Phantom`."""
    options.setdefault("localiser", False)
    options.setdefault("step_mm", 150.0 / slices)
    return study(Phantom(kind=Kind(kind), slices=slices, matrix=matrix, **options))


def ct_image(**options: Any) -> Dataset:
    """One slice through the middle of a head."""
    return ct_series(slices=1, **options)[0]


def real_size_study(kind: Kind | str = Kind.PLAIN, **options: Any) -> list[Dataset]:
    """A study as a scanner sends it: localiser and 30 slices of 512 x 512."""
    return list(instances(Phantom(kind=Kind(kind), **options)))


def changed(datasets: Sequence[Dataset], **values: Any) -> list[Dataset]:
    """Copies in which each keyword has its value; None removes the attribute."""
    copies = [copy.deepcopy(dataset) for dataset in datasets]
    for dataset in copies:
        for keyword, value in values.items():
            if value is not None:
                setattr(dataset, keyword, value)
            elif keyword in dataset:
                delattr(dataset, keyword)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    return copies


def other_patient(datasets: Sequence[Dataset]) -> list[Dataset]:
    """The same UIDs under another person's name and ID (H3, H5)."""
    return changed(datasets, PatientName="INTRUDER^OTHER", PatientID="OTHER-1")


def other_pixels(dataset: Dataset) -> Dataset:
    """The same SOP Instance UID with different pixels (H2)."""
    (twin,) = changed([dataset])
    pixels = np.frombuffer(twin.PixelData, "<u2") ^ 1
    twin.PixelData = pixels.tobytes()
    return twin


def compressed(dataset: Dataset, syntax: UID = RLELossless) -> Dataset:
    """The same pixels in another transfer syntax; the SOP Instance UID is kept."""
    (twin,) = changed([dataset])
    twin.compress(syntax, generate_instance_uid=False)
    return twin


def ctich_study(patient: int, *, tenant_salt: str = "") -> list[Dataset]:
    """A patient of ct-ich as CT images, de-windowed so that nothing is rounded.

    Grey values are stored as they are; RescaleSlope 120/255 and RescaleIntercept -20 turn them
    into Hounsfield units. What lay outside the window (air, bone) is clipped for good: the images
    say DERIVED, and why. Skips the test where the data are absent.
    """
    rows = [row for row in _ctich_rows() if int(row["patient"]) == patient]
    if not rows:
        raise ValueError(f"ct-ich has no patient {patient}")
    rows.sort(key=lambda row: int(row["slice"]))
    template = Phantom(
        kind=Kind.PLAIN,
        seed=patient,
        salt=f"ct-ich{tenant_salt}",
        slices=1,
        localiser=False,
        matrix=16,
    )
    (base,) = study(template)
    return [_ctich_image(base, template, row, index) for index, row in enumerate(rows)]


def ctich_truth(patient: int) -> bool:
    """Whether any of the patient's slices carries a label."""
    return any(row["any"] == "1" for row in _ctich_rows() if int(row["patient"]) == patient)


def ctich_patients() -> list[int]:
    return sorted({int(row["patient"]) for row in _ctich_rows()})


def _ctich_rows() -> list[dict[str, str]]:
    manifest = DATA / "ct-ich" / "manifest.csv"
    if not manifest.exists():
        message = f"{manifest} is not here (set VIGIL_TEST_DATA)"
        if os.environ.get("VIGIL_REQUIRE_PEERS"):
            pytest.fail(message)
        pytest.skip(message)
    with manifest.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _ctich_image(base: Dataset, phantom: Phantom, row: dict[str, str], index: int) -> Dataset:
    dataset = copy.deepcopy(base)
    grey = np.asarray(Image.open(DATA / "ct-ich" / row["brain"]).convert("L"))
    dataset.Rows, dataset.Columns = grey.shape
    dataset.PixelData = grey.astype("<u2").tobytes()
    dataset.RescaleSlope = f"{CTICH_WIDTH_HU / 255:.14f}"  # 16 characters, the most a DS may have
    dataset.RescaleIntercept = f"{CTICH_LEVEL_HU - CTICH_WIDTH_HU / 2:g}"
    dataset.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    dataset.DerivationDescription = "De-windowed from 8-bit pictures, level 40 width 120; derived"
    dataset.SeriesDescription = "HEAD 5 mm derived from pictures"
    dataset.PatientName = f"CTICH^{row['patient']}"
    dataset.PatientID = f"CTICH-{row['patient']}"
    dataset.PatientAge = f"{max(round(float(row['age_years'])), 0):03d}Y"
    dataset.PatientSex = row["sex"][:1].upper() or "O"
    dataset.AccessionNumber = f"CI{row['patient']}"
    dataset.ManufacturerModelName = "ct-ich"
    dataset.InstanceNumber = index + 1
    dataset.PixelSpacing = [str(CTICH_PIXEL_MM)] * 2
    edge = -CTICH_PIXEL_MM * (grey.shape[0] - 1) / 2
    dataset.ImagePositionPatient = [f"{edge:.4f}", f"{edge:.4f}", f"{index * CTICH_STEP_MM:g}"]
    dataset.SliceThickness = f"{CTICH_STEP_MM:g}"
    dataset.SOPInstanceUID = phantom.uid("ct-ich", row["slice"])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset
