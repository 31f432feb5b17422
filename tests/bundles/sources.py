"""Small DICOM images for tests of the pure part, and their way into it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as DicomSequence
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from db.describe import _header as header_of_dataset
from db.header import InstanceHeader
from db.pixels import read_images
from inference.manifest import Manifest
from inference.volume import Decoded, Volume, build_volume

CT, DX = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.1.1"
AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def image(stored: NDArray[Any], **attributes: Any) -> Dataset:
    """A grey image of int16 or uint16 values; `attributes` by keyword, None to leave one out."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = CT
    ds.SOPInstanceUID = generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.1"
    ds.Modality = "CT"
    ds.Rows, ds.Columns = stored.shape[-2:]
    if stored.ndim == 3:
        ds.NumberOfFrames = len(stored)
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = np.ascontiguousarray(stored).tobytes()
    ds["PixelData"].VR = "OW"
    for keyword, value in attributes.items():
        if value is None:
            del ds[keyword]
        else:
            setattr(ds, keyword, value)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    return ds


def ct_slice(stored: NDArray[Any], z: float = 0.0, **attributes: Any) -> Dataset:
    """An axial head slice whose stored values are Hounsfield units."""
    given = {
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "BodyPartExamined": "HEAD",
        "ConvolutionKernel": "STANDARD",
        "ImageOrientationPatient": AXIAL,
        "ImagePositionPatient": [-100.0, -100.0, z],
        "PixelSpacing": [2.0, 2.0],
        "SliceThickness": 5.0,
        "RescaleSlope": 1,
        "RescaleIntercept": 0,
        "SeriesNumber": 2,
    }
    absent = [keyword for keyword, value in attributes.items() if value is None]
    kept = {k: v for k, v in (given | attributes).items() if k not in absent or k not in given}
    return image(stored, **kept)


def head(n: int = 16, size: int = 128) -> NDArray[np.int16]:
    """Something like a head, (n, size, size) in HU at 2 mm: skin, skull, brain, with texture."""
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    volume = np.full((n, size, size), -1000, np.float32)
    for i in range(n):
        shrink = np.sqrt(1 - ((i - n / 2) / (n * 0.75)) ** 2)
        r = np.hypot((x - size * 0.52) / 38, (y - size * 0.48) / 46) / shrink
        volume[i][r < 1.0] = 20  # skin
        volume[i][r < 0.95] = 900
        volume[i][r < 0.86] = 32
        inside = r < 0.86
        volume[i][inside] += rng.normal(0, 4, inside.sum())
        volume[i][np.hypot(x - size * 0.6, y - size * (0.3 + 0.02 * i)) < 6] += 35
    return volume.round().astype(np.int16)


def head_series(n: int = 16, step: float = 5.0, **attributes: Any) -> list[Dataset]:
    return [
        ct_slice(pixels, z=step * i, InstanceNumber=n - i, **attributes)
        for i, pixels in enumerate(head(n))
    ]


def radiograph(stored: NDArray[Any], **attributes: Any) -> Dataset:
    """A frontal chest radiograph."""
    given = {
        "SOPClassUID": DX,
        "Modality": "DX",
        "ImageType": ["ORIGINAL", "PRIMARY"],
        "BodyPartExamined": "CHEST",
        "ViewPosition": "PA",
        "PixelSpacing": [0.5, 0.5],
        "WindowCenter": 2048,
        "WindowWidth": 4096,
        "BitsStored": 12,
        "HighBit": 11,
    }
    return image(stored, **(given | attributes))


def header_of(ds: Dataset) -> InstanceHeader:
    return header_of_dataset(ds, str(ds.file_meta.TransferSyntaxUID))


TWO = np.arange(-32, 32, dtype=np.int16).reshape(8, 8) * 30  # the first of `enhanced`'s frames


def enhanced() -> Dataset:
    """Two frames: geometry and rescale per frame, orientation and spacing shared."""
    ds = image(np.stack([TWO, TWO + 1]), SOPClassUID="1.2.840.10008.5.1.4.1.1.2.1")
    shared = Dataset()
    orientation, measures = Dataset(), Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.4], 5
    shared.PlaneOrientationSequence = DicomSequence([orientation])
    shared.PixelMeasuresSequence = DicomSequence([measures])
    ds.SharedFunctionalGroupsSequence = DicomSequence([shared])
    frames = []
    for z, slope in ((10, 1), (5, 2)):
        frame, position, values = Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient = [0, 0, z]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = slope, -z, "HU"
        frame.PlanePositionSequence = DicomSequence([position])
        frame.PixelValueTransformationSequence = DicomSequence([values])
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = DicomSequence(frames)
    return ds


def headers_of(datasets: Iterable[Dataset]) -> dict[str, InstanceHeader]:
    """By instance id; the SOP instance UID serves as one."""
    return {ds.SOPInstanceUID: header_of(ds) for ds in datasets}


def decoded(ds: Dataset, folder: Path) -> Decoded:
    """Through a file and the product's own decoder."""
    path = folder / f"{ds.SOPInstanceUID}.dcm"
    ds.save_as(path, enforce_file_format=True)
    meta, (pixels,) = read_images(str(path))
    return Decoded(ds.SOPInstanceUID, header_of(ds), meta, pixels)


def volume_of(datasets: Sequence[Dataset], manifest: Manifest, folder: Path) -> Volume:
    return build_volume([decoded(ds, folder) for ds in datasets], manifest)
