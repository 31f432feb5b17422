"""What an analysis found: values that check themselves and travel between stages as JSON.

A raw score and a calibrated probability are two types: mypy refuses to report the wrong one.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Code:
    """A coded concept: value, coding scheme designator, meaning (PS3.3 Table 8.8-1)."""

    value: str
    scheme: str
    meaning: str

    def __post_init__(self) -> None:
        if not (0 < len(self.value) <= 16 and 0 < len(self.scheme) <= 16 and self.meaning):
            raise ValueError(f"not a code: {self}")


@dataclass(frozen=True, slots=True, order=True)
class RawScore:
    """A model output before calibration, as a logit. Ranks images; never shown as a percent."""

    logit: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit):
            raise ValueError(f"not a raw score: {self.logit}")

    @property
    def output(self) -> float:
        """The sigmoid of the logit, 0..1: what reports call the uncalibrated classifier output."""
        if self.logit >= 0:
            return 1.0 / (1.0 + math.exp(-self.logit))
        grown = math.exp(self.logit)
        return grown / (1.0 + grown)


@dataclass(frozen=True, slots=True)
class CalibratedProbability:
    """A probability fit to show to a radiologist, at a stated prevalence.

    `reference` is on the scale of the bundle's own prevalence: thresholds are compared with it and
    with nothing else, so that PRESENT never changes with a site's prevalence.
    """

    value: float  # 0..1, at `prevalence`
    prevalence: float  # 0..1, what `value` assumes
    reference: float  # 0..1, at the bundle's reference prevalence
    lower_clip: float  # 0..1, what the calibration data can support, at `prevalence`
    upper_clip: float

    def __post_init__(self) -> None:
        inside = all(0.0 <= x <= 1.0 for x in (self.value, self.reference))
        bounds = 0.0 <= self.lower_clip < self.upper_clip <= 1.0
        if not (inside and bounds and 0.0 < self.prevalence < 1.0):  # NaN fails too
            raise ValueError(f"not a calibrated probability: {self}")


class LabelStatus(StrEnum):
    VALIDATED = "validated"
    EXPLORATORY = "exploratory"  # few positive patients: raw score only, never a percent


class Urgency(StrEnum):
    STAT = "STAT"
    URGENT = "URGENT"
    ROUTINE = "ROUTINE"


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One analysed image: an instance, or one frame of it."""

    instance_id: str  # the id drawn at reception
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    frame: int | None  # 1-based for a multi-frame instance, else None
    instance_number: int | None
    position_mm: float | None  # along the normal; None where the unit is a single image
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class LabelResult:
    """What the bundle says of one label for the whole study."""

    label: str  # the manifest's id
    words: str  # as the page shows it
    code: Code
    status: LabelStatus
    raw: RawScore
    probability: CalibratedProbability | None  # None exactly for exploratory labels
    threshold: float | None  # on the reference scale; None exactly for exploratory labels
    top_image: int  # index into Finding.images, where this label's raw score is highest

    def __post_init__(self) -> None:
        exploratory = self.status is LabelStatus.EXPLORATORY
        if (self.probability is None) != exploratory or (self.threshold is None) != exploratory:
            raise ValueError(
                f"label {self.label}: exploratory labels have neither probability nor threshold"
            )

    @property
    def is_present(self) -> bool | None:
        """None where it cannot be said: Undetermined."""
        if self.probability is None or self.threshold is None:
            return None
        return self.probability.reference >= self.threshold


@dataclass(frozen=True, slots=True)
class Region:
    """A closed rectangle round the strongest attention, in pixels of the original matrix."""

    left: float
    top: float
    right: float
    bottom: float


@dataclass(frozen=True, slots=True)
class KeyImage:
    """An image worth showing, with its heat map's place in the result's map file."""

    image: int  # index into Finding.images
    label: str  # the label the heat map was computed for
    raw: RawScore  # of that label on this image
    region: Region | None


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which numbers made these numbers."""

    bundle: str
    version: str
    architecture: str
    weights_sha256: str
    calibration_id: str
    aggregation: str
    preprocessing: str
    numerics: str  # what served: "fp32", "bf16", ...


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """The manifest's words and codes for reports and pages, kept with the numbers they describe.

    So a result can be built again, byte for byte, after the bundle has changed. All strings ASCII.
    """

    algorithm: str  # at most 64 characters, e.g. the name in the report's algorithm identification
    short_name: str  # in series descriptions and tracking identifiers, e.g. "ICH AI"
    title: str  # heading of the summary page
    procedure: Code  # Procedure reported, CID 100
    body_part: str  # BodyPartExamined (CS)
    laterality: str  # "", "R", "L", "B" ("" where the body part is unpaired)
    window_centre: float  # display window, in the modality's rescaled values
    window_width: float
    image_word: str  # "slice" or "image"
    summary_series: str  # series descriptions, at most 64 characters
    overlay_series: str
    report_series: str
    key_series: str
    map_series: str
    attention_words: str  # printed on each overlay
    disclaimer: str
    conclusion_present: str  # one sentence; never that something is not there
    conclusion_absent: str
    map_word: str = "Grad-CAM"  # how heat maps were made, as their authors call it

    def __post_init__(self) -> None:
        if not all(str(getattr(self, name)).isascii() for name in self.__slots__):
            raise ValueError("the output words of a bundle must be ASCII")


@dataclass(frozen=True, slots=True)
class Eligibility:
    """Whether a study can be judged; each refusal names the rule, the value found and the limit."""

    rule: str
    value: str
    limit: str
    reason: str  # one sentence for a person
    is_applicable: bool = True  # False: another kind of study altogether; silent


@dataclass(frozen=True, slots=True)
class SentObject:
    """An object of ours that a destination has, or may have."""

    result_id: str  # of the result or notice it is of
    role: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    is_certain: bool  # accepted; else sent, and whether it arrived is not known


@dataclass(frozen=True, slots=True)
class Finding:
    """The numbers of one result, persisted before any object is built from them."""

    result_uuid: str  # uuid4, drawn when the numbers are persisted
    started_at: str  # ISO 8601 UTC, when the analysis began
    model: ModelIdentity
    images: tuple[ImageRef, ...]  # everything analysed, in order along the normal
    labels: tuple[LabelResult, ...]  # in the manifest's order; the first is the primary one
    image_logits: Mapping[str, tuple[float, ...]]  # label -> one raw logit an image
    key_images: tuple[KeyImage, ...]  # empty unless positive; ascending along the normal
    urgency: Urgency
    output: OutputSpec
    is_partial: bool = False  # over an incomplete series
    notes: tuple[str, ...] = ()  # holes, mixed spacing: what a reader must know
    map_scale: float = 0.0  # the study's strongest raw heat-map value
    shows_regions: bool = False  # the bundle's pointing game beats its controls

    def __post_init__(self) -> None:
        if not self.images or not self.labels:
            raise ValueError("a finding needs images and labels")
        if any(len(scores) != len(self.images) for scores in self.image_logits.values()):
            raise ValueError("every label needs one logit an image")

    @property
    def primary(self) -> LabelResult:
        return self.labels[0]

    @property
    def is_positive(self) -> bool:
        """Whether any validated label reaches its threshold."""
        return any(label.is_present for label in self.labels)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        fields = dict(value)
        fields["model"] = ModelIdentity(**fields["model"])
        fields["images"] = tuple(ImageRef(**image) for image in fields["images"])
        fields["labels"] = tuple(_label(label) for label in fields["labels"])
        fields["image_logits"] = {name: tuple(row) for name, row in fields["image_logits"].items()}
        fields["key_images"] = tuple(_key_image(key) for key in fields["key_images"])
        fields["urgency"] = Urgency(fields["urgency"])
        fields["output"] = OutputSpec(
            **{**fields["output"], "procedure": Code(**fields["output"]["procedure"])}
        )
        fields["notes"] = tuple(fields["notes"])
        return cls(**fields)


def _label(value: Mapping[str, Any]) -> LabelResult:
    fields = dict(value)
    fields["code"] = Code(**fields["code"])
    fields["status"] = LabelStatus(fields["status"])
    fields["raw"] = RawScore(**fields["raw"])
    if fields["probability"] is not None:
        fields["probability"] = CalibratedProbability(**fields["probability"])
    return LabelResult(**fields)


def _key_image(value: Mapping[str, Any]) -> KeyImage:
    fields = dict(value)
    fields["raw"] = RawScore(**fields["raw"])
    fields["region"] = Region(**fields["region"]) if fields["region"] else None
    return KeyImage(**fields)


def percent(probability: CalibratedProbability) -> str:
    """The one rounding for pages: whole percent, `<` or `>` at the ends the data can support."""
    if probability.value <= probability.lower_clip:
        return f"< {_whole(probability.lower_clip, up=True)} %"
    if probability.value >= probability.upper_clip:
        return f"> {_whole(probability.upper_clip, up=False)} %"
    return f"{round(100 * probability.value)} %"


def percent_exact(value: float) -> float:
    """The one rounding for reports: percent with two decimals."""
    return round(100 * value, 2)


def _whole(value: float, *, up: bool) -> int:
    return math.ceil(100 * value) if up else math.floor(100 * value)
