"""What a bundle's manifest can say: everything that is particular to one clinical question.

A complete, commented example stands in docs/bundles.md. Words (body parts, kernels, ...) are
compared as `inference.words` says: without regard to case, as whole words, `ANGIO*` for a
beginning.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from db.result import Code, LabelStatus, OutputSpec, Urgency

#: For pydantic, which reads the files into these classes; it holds for all classes inside one.
STRICT: dict[str, Any] = {"extra": "forbid", "strict": True}

Pair = tuple[float, float]  # lower, upper; both belong to the range

#: What can explain a logit; `inference.heatmap` has the papers.
CamMethod = Literal["grad-cam", "grad-cam++", "hirescam", "layercam"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applies:
    """Header rules.

    Modality, SOP class and body part decide whether the study concerns this bundle at all; the
    rest, whether it can be judged.
    """

    modalities: tuple[str, ...]
    sop_classes: tuple[str, ...]  # storage SOP class UIDs
    body_parts: tuple[str, ...]  # words for the right part, in BodyPartExamined and descriptions
    other_parts: tuple[str, ...] = ()  # words for parts this bundle does not judge
    unstated_part: Literal["accept", "refuse"] = "accept"  # accept: the pixel rules will judge
    orientation: Literal["axial", "coronal", "sagittal", "any"] = "any"
    max_tilt_degrees: float = 35.0  # of the normal, off that axis; a tilted gantry is no oblique
    excluded_image_types: tuple[str, ...] = ()  # values of ImageType, anywhere in it
    excluded_words: tuple[str, ...] = ()  # in the series description
    phantom_words: tuple[str, ...] = ()  # in any description or the protocol's name
    excluded_kernels: tuple[str, ...] = ()  # words of ConvolutionKernel
    contrast: Literal["accept", "refuse"] = "accept"
    no_contrast_words: tuple[str, ...] = ()  # contents of ContrastBolusAgent that mean none
    contrast_words: tuple[str, ...] = ()  # in the series description
    lossy: Literal["accept", "refuse"] = "accept"
    min_bits_stored: int = 1

    def __post_init__(self) -> None:
        if not (self.modalities and self.sop_classes and self.body_parts):
            raise ValueError("modalities, sop_classes and body_parts must not be empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionSpec:
    """Which images of an eligible study are analysed."""

    unit: Literal["volume", "image"]  # volume: one series along one axis; image: each by itself
    min_images: int = 1
    max_images: int = 5000
    min_coverage_mm: float = 0.0  # first to last image, their thickness included
    thickness_mm: Pair | None = None  # of every slice; None: any
    hole_factor: float = 1.75  # a step over this many usual steps, or own thicknesses, is a hole
    preferred_thickness_mm: float | None = None  # ranking: the nearer the better
    preferred_kernels: tuple[str, ...] = ()  # ranking: words of ConvolutionKernel
    views: tuple[str, ...] = ()  # ViewPosition, best first; empty: any
    unstated_view: Literal["accept", "refuse"] = "refuse"

    def __post_init__(self) -> None:
        if not 1 <= self.min_images <= self.max_images:
            raise ValueError("min_images must be 1..max_images")
        if not 1.0 < self.hole_factor <= 2.0:
            raise ValueError("hole_factor must be over 1 and at most 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class BodySpec:
    """How the body is told from its surroundings, and the limits of its size."""

    above: float  # pixels over this belong to the body, bone to skin; within value_range
    area_cm2: Pair | None = None  # of the filled body on the image where it is largest
    extent_mm: Pair | None = None  # longer side of its box over all images


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A figure of the pixels of all images that is limited in real ones.

    Either the share of the filled body's pixels that have these values, or the noise from pixel to
    pixel, wherever the mean of a pixel's four neighbours has these values.
    """

    name: str
    values: Pair  # low <= value < high, after clipping to value_range
    share: Pair | None = None  # 0..1
    noise: Pair | None = None  # standard deviation, in the values' unit

    def __post_init__(self) -> None:
        if (self.share is None) == (self.noise is None):
            raise ValueError("a gate limits either share or noise")


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelSpec:
    """What the pixel values mean and what real ones look like."""

    domain: Literal["HU", "VOI"]  # VOI: shown grey 0..1, by the image's own window or LUT
    value_range: Pair  # nothing outside it is ever looked at: all that the training data knew
    monochrome1: Literal["invert", "refuse"] = "refuse"
    needs_spacing: bool = False
    rows: tuple[int, int] = (64, 8192)  # of the source matrix, for columns as well
    body: BodySpec | None = None
    gates: tuple[Gate, ...] = ()

    def __post_init__(self) -> None:
        low, high = self.value_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError("value_range must be two numbers, low then high")
        if self.body and not low <= self.body.above < high:
            raise ValueError("body.above must lie within value_range")
        if self.gates and not self.body:
            raise ValueError("gates are shares of the body: they need [pixels.body]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A grey window in the pixels' domain, shown as 0..1; must lie within value_range."""

    centre: float
    width: float  # > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """How an image becomes a model input.

    Channels are all windows of the lowest neighbour first, then of the next, ending with the
    highest: (2 * neighbours + 1) * len(windows) of them.
    """

    size: int  # pixels, square
    windows: tuple[Window, ...]
    mean: tuple[float, ...]  # one a channel, of the windowed 0..1 values
    std: tuple[float, ...]
    neighbours: int = 0  # images on each side as further channels; the ends repeat
    crop: Literal["body", "none"] = "none"  # body: one square round the body of the whole volume
    crop_margin: float = 0.04  # of the box's longer side, on each side
    slab_mm: float | None = None  # thinner series are averaged to slabs of this thickness

    def __post_init__(self) -> None:
        if self.size < 16 or not self.windows or self.neighbours < 0:
            raise ValueError("size must be 16 or more, windows not empty, neighbours 0 or more")
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"mean and std need one number for each of {self.channels} channels")
        if not all(value > 0 for value in (*self.std, *(w.width for w in self.windows))):
            raise ValueError("std and window widths must be positive")

    @property
    def channels(self) -> int:
        return (2 * self.neighbours + 1) * len(self.windows)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceSpec:
    """A head that judges an image cell by cell: `inference.evidence`."""

    stages: tuple[int, ...]  # timm's feature stages (`out_indices`), ascending
    grid: int  # the one of them whose cells are judged
    width: int  # channels of each member
    members: int = (
        1  # heads on one backbone, fitted from different seeds; their logits are averaged
    )
    cells: int = 8  # so many of the strongest make an image's logit

    def __post_init__(self) -> None:
        if list(self.stages) != sorted(set(self.stages)) or self.grid not in self.stages:
            raise ValueError("stages must ascend, and grid be one of them")
        if min(self.width, self.members, self.cells) < 1:
            raise ValueError("width, members and cells must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatingPoint:
    """A threshold that was measured; for pages and cards, `LabelSpec.threshold` is what serves."""

    name: str
    threshold: float  # reference scale
    sensitivity: float
    specificity: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSpec:
    """One output of the model, in the order of its last layer."""

    id: str
    words: str  # as the page shows it, ASCII
    code: Code
    status: LabelStatus
    reference_prevalence: float | None = None  # validated: the scale of thresholds, 0..1
    threshold: float | None = None  # validated: on the reference scale
    implies: tuple[str, ...] = ()  # labels that are at least as probable as this one
    operating_points: tuple[OperatingPoint, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", self.id) or not self.words.isascii():
            raise ValueError("id must match ^[a-z][a-z0-9_]{0,31}$ and words be ASCII")
        numbers = (self.reference_prevalence, self.threshold)
        if self.status is LabelStatus.EXPLORATORY and numbers != (None, None):
            raise ValueError("an exploratory label has neither threshold nor reference_prevalence")
        if self.status is LabelStatus.VALIDATED and not all(
            number is not None and 0 < number < 1 for number in numbers
        ):
            raise ValueError("a validated label needs threshold and reference_prevalence in 0..1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """From image logits to one study logit; see `inference.predict.aggregate`."""

    kind: Literal["max", "topk_mean", "noisy_or", "smoothed_max", "ranked"]
    k: int = 1  # topk_mean: images averaged; smoothed_max: images in the running mean, odd
    weights: tuple[float, ...] = ()  # ranked: of the highest of k logits, the second highest, ...

    def __post_init__(self) -> None:
        if self.k < 1 or (self.kind == "smoothed_max" and self.k % 2 == 0):
            raise ValueError("k must be at least 1, and odd for smoothed_max")
        if len(self.weights) != (self.k if self.kind == "ranked" else 0):
            raise ValueError("weights are for ranked alone, which needs k of them")
        if self.weights and (min(self.weights) < 0 or self.weights[0] <= 0):
            raise ValueError("no weight may be below 0, and the first must be above")

    def __str__(self) -> str:
        if self.kind == "ranked":
            return f"ranked {' '.join(f'{w:g}' for w in self.weights)}"
        has_k = self.kind in ("topk_mean", "smoothed_max")
        return f"{self.kind} k={self.k}" if has_k else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class UrgencyRule:
    """A present label's urgency; the most urgent rule that holds counts, else ROUTINE."""

    label: str  # validated
    level: Urgency
    at: float | None = None  # reference scale; None: the label's threshold, or the tenant's


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    primary: str  # must be the first label
    aggregation: Aggregation
    # Images on each side that have a say in an image's logits; see `inference.predict.in_context`.
    context: int = 0
    urgency: tuple[UrgencyRule, ...] = ()
    activation: Literal["sigmoid"] = "sigmoid"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainSpec:
    layer: str  # the module's name in the model, e.g. "conv_head"
    method: CamMethod = "grad-cam"
    key_images: int = 3  # at most
    pointing_game: float | None = None  # share of hits, 0..1, and its two controls
    pointing_game_untrained: float | None = None
    pointing_game_brightest: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.key_images <= 10:
            raise ValueError("key_images must be 1..10")

    @property
    def shows_regions(self) -> bool:
        """Whether the maps point better than both controls, so that boxes may be drawn."""
        controls = (self.pointing_game_untrained, self.pointing_game_brightest)
        score = self.pointing_game
        return score is not None and all(c is not None and score > c for c in controls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The whole of manifest.toml."""

    __pydantic_config__: ClassVar[dict[str, Any]] = STRICT

    name: str
    version: str
    architecture: str  # any timm name
    weights_sha256: str  # of model.safetensors
    licence: str
    intended_use: str
    applies: Applies
    selection: SelectionSpec
    pixels: PixelSpec
    input: InputSpec
    labels: tuple[LabelSpec, ...]
    study: StudySpec
    explain: ExplainSpec
    output: OutputSpec
    evidence: EvidenceSpec | None = None  # None: the architecture's own classifier
    trained_on: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", self.name):
            raise ValueError("name must match ^[a-z][a-z0-9-]{0,31}$")
        if not re.fullmatch(r"[0-9a-f]{64}", self.weights_sha256):
            raise ValueError("weights_sha256 must be 64 lower-case hexadecimal digits")
        self._check_labels()
        self._check_values()

    @property
    def outputs(self) -> int:
        """How many numbers the model gives of an image."""
        return len(self.labels) * (2 if self.study.context else 1)

    def label(self, label_id: str) -> LabelSpec:
        return next(label for label in self.labels if label.id == label_id)

    def _check_labels(self) -> None:
        ids = [label.id for label in self.labels]
        if not ids or len(set(ids)) != len(ids):
            raise ValueError("labels must not be empty, nor an id be used twice")
        named = {x for label in self.labels for x in label.implies}
        named |= {rule.label for rule in self.study.urgency}
        if strange := sorted(named - set(ids)):
            raise ValueError(f"no such label: {', '.join(strange)}")
        if self.study.primary != ids[0]:
            raise ValueError("study.primary must be the first label")
        for rule in self.study.urgency:
            if self.label(rule.label).status is LabelStatus.EXPLORATORY:
                raise ValueError(f"study.urgency: {rule.label} is exploratory, never urgent")

    def _check_values(self) -> None:
        low, high = self.pixels.value_range
        for window in self.input.windows:
            half = window.width / 2
            if window.centre - half < low - 1e-6 or window.centre + half > high + 1e-6:
                raise ValueError(f"input.windows: {window} passes value_range {low}..{high}")
        if self.input.crop == "body" and self.pixels.body is None:
            raise ValueError('input.crop = "body" needs [pixels.body]')
        if self.study.context < 0:
            raise ValueError("study.context must be 0 or more")
        volumes_only = (self.input.neighbours, self.input.slab_mm, self.study.context)
        if self.selection.unit == "image" and any(volumes_only):
            raise ValueError("a single image has neither neighbours, nor slabs, nor context")
