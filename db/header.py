"""What the node knows of an instance without its pixels: the header, reduced to plain values."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceHeader:
    """The attributes by which a bundle judges an image; names follow the DICOM keywords.

    Made in a sandboxed child (`db.sandbox`), stored as JSON beside the instance's row. A value
    that is absent or cannot be read is None or empty: judging is for the bundle's manifest.
    Nothing in here identifies a person.
    """

    sop_class_uid: str
    sop_instance_uid: str
    study_instance_uid: str
    series_instance_uid: str
    transfer_syntax_uid: str
    modality: str = ""
    image_type: tuple[str, ...] = ()
    body_part: str = ""
    series_description: str = ""
    study_description: str = ""
    protocol_name: str = ""
    kernel: str = ""  # ConvolutionKernel
    contrast_agent: str = ""  # ContrastBolusAgent
    manufacturer: str = ""
    model: str = ""
    series_number: int | None = None
    instance_number: int | None = None
    acquisition_number: int | None = None
    study_date: str = ""  # YYYYMMDD, empty when absent or invalid
    patient_age_years: float | None = None
    rows: int | None = None
    columns: int | None = None
    frames: int = 1
    bits_allocated: int | None = None
    bits_stored: int | None = None
    pixel_representation: int | None = None
    samples_per_pixel: int | None = None
    photometric: str = ""
    rescale_slope: float | None = None
    rescale_intercept: float | None = None
    rescale_type: str = ""
    orientation: tuple[float, ...] | None = None  # six direction cosines
    position: tuple[float, ...] | None = None  # mm, patient coordinates
    pixel_spacing: tuple[float, ...] | None = None  # mm, row spacing first
    slice_thickness: float | None = None  # mm
    gantry_tilt: float | None = None  # degrees
    patient_position: str = ""  # HFS, FFS, ...
    view_position: str = ""
    laterality: str = ""
    frame_of_reference_uid: str = ""
    is_lossy: bool = False  # as LossyImageCompression states, or its syntax implies

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The header stored by `to_json`; keys of a newer node are passed over."""
        known = {field.name for field in fields(cls)}
        plain: dict[str, Any] = {
            name: tuple(item) if isinstance(item, list) else item
            for name, item in value.items()
            if name in known
        }
        return cls(**plain)
