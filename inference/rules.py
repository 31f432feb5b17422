"""The header rules of a manifest, in order; each says what it found, and what it allows."""

from collections.abc import Callable

from db.header import InstanceHeader
from db.result import Eligibility
from inference import geometry
from inference.manifest import Manifest
from inference.words import first_match

Rule = Callable[[InstanceHeader, Manifest], Eligibility | None]


def refusal(header: InstanceHeader, manifest: Manifest) -> tuple[int, Eligibility] | None:
    """The first rule that an image breaks, with its place: the later, the nearer it came."""
    for place, rule in enumerate(RULES):
        if broken := rule(header, manifest):
            return place, broken
    return None


def _modality(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    allowed = manifest.applies.modalities
    if header.modality.upper() in allowed:
        return None
    return _other_study("modality", header.modality, allowed, "Another modality.")


def _sop_class(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    allowed = manifest.applies.sop_classes
    if header.sop_class_uid in allowed:
        return None
    return _other_study("sop_class", header.sop_class_uid, allowed, "Another kind of object.")


def _body_part(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    """The most particular text that names parts decides, unless it names right and wrong ones."""
    applies = manifest.applies
    texts = (
        header.series_description, header.protocol_name, header.body_part, header.study_description,
    )  # fmt: skip
    for text in texts:
        right, wrong = first_match(text, applies.body_parts), first_match(text, applies.other_parts)
        if right and not wrong:
            return None
        if wrong and not right:
            return _other_study("body_part", wrong, applies.body_parts, "Another part of the body.")
    if applies.unstated_part == "accept":
        return None
    stated = header.body_part or "not stated"
    return _other_study(
        "body_part", stated, applies.body_parts, "The part of the body is not stated."
    )


def _phantom(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    texts = (
        header.series_description,
        header.study_description,
        header.protocol_name,
        header.body_part,
    )
    for text in texts:
        if word := first_match(text, manifest.applies.phantom_words):
            return Eligibility("phantom", word, "a patient", "A phantom or a quality check.")
    return None


def _image_type(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    values = [value.upper() for value in header.image_type]
    for excluded in manifest.applies.excluded_image_types:
        if excluded.upper() in values:
            reason = "Localisers and derived images of this type are not analysed."
            return Eligibility("image_type", excluded, "other image types", reason)
    return None


def _description(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    word = first_match(header.series_description, manifest.applies.excluded_words)
    reason = "The series' description names a kind of series that is not analysed."
    return Eligibility("series_description", word, "other series", reason) if word else None


def _colour(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    if header.samples_per_pixel not in (None, 1) or header.photometric.upper() not in (
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        reason = "The image is not a grey one."
        return Eligibility("photometric", header.photometric or "not stated", "MONOCHROME", reason)
    if header.photometric.upper() == "MONOCHROME1" and manifest.pixels.monochrome1 == "refuse":
        return Eligibility(
            "photometric", "MONOCHROME1", "MONOCHROME2", "The grey scale is turned round."
        )
    return None


def _depth(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    least, bits = manifest.applies.min_bits_stored, header.bits_stored
    if bits is None or bits >= least:
        return None
    return Eligibility("bits_stored", str(bits), f">= {least}", "The pixel values are too coarse.")


def _lossy(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    if header.is_lossy and manifest.applies.lossy == "refuse":
        return Eligibility("lossy", "01", "00", "The images were compressed with loss.")
    return None


def _matrix(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    low, high = manifest.pixels.rows
    for size in (header.rows, header.columns):
        if size is None or not low <= size <= high:
            found = f"{header.rows} x {header.columns}"
            return Eligibility(
                "matrix", found, f"{low}..{high}", "The matrix is too small or too large."
            )
    return None


def _rescale(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    if manifest.pixels.domain != "HU":
        return None
    if header.rescale_slope is None or header.rescale_intercept is None:
        reason = "Rescale Slope or Intercept is missing: the values have no unit."
        return Eligibility("rescale", "missing", "slope and intercept", reason)
    if header.rescale_slope == 0:
        return Eligibility("rescale", "slope 0", "not 0", "Rescale Slope is zero.")
    if header.rescale_type.upper() not in ("", "HU", "HU_MOD"):
        return Eligibility(
            "rescale", header.rescale_type, "HU", "The values are no Hounsfield units."
        )
    return None


def _kernel(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    word = first_match(header.kernel, manifest.applies.excluded_kernels)
    reason = "Reconstructed with a kernel that is not analysed."
    return Eligibility("kernel", header.kernel, f"not {word}", reason) if word else None


def _contrast(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    applies = manifest.applies
    if applies.contrast == "accept":
        return None
    # An agent may be a product's name: it is not repeated.
    if header.contrast_agent and not first_match(header.contrast_agent, applies.no_contrast_words):
        return Eligibility("contrast", "agent stated", "none", "Contrast agent was given.")
    if word := first_match(header.series_description, applies.contrast_words):
        return Eligibility(
            "contrast", word, "none", "The series' description names contrast agent."
        )
    return None


def _orientation(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    if manifest.selection.unit == "image" and manifest.applies.orientation == "any":
        return None
    return orientation_refusal(header.orientation, manifest)


def orientation_refusal(
    orientation: geometry.Cosines | None, manifest: Manifest
) -> Eligibility | None:
    """Also for the pixel rules, since a multi-frame's header tells of its first frame alone."""
    wanted, limit = manifest.applies.orientation, manifest.applies.max_tilt_degrees
    if orientation is None or not geometry.is_orthonormal(orientation):
        return Eligibility(
            "orientation", "not stated", wanted, "Where the images lie is not stated."
        )
    name, angle = geometry.plane(orientation)
    if wanted not in ("any", name):
        return Eligibility("orientation", name, wanted, "The images lie in another plane.")
    if angle > limit:
        reason = "The images are too oblique."
        return Eligibility("tilt", f"{angle:.1f} degrees", f"<= {limit:g} degrees", reason)
    return None


_FURTHEST_MM = 1e5


def _position(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    if any(abs(value) > _FURTHEST_MM for value in header.position or ()):
        limit = f"within {_FURTHEST_MM:g} mm"
        return Eligibility("position", "beyond", limit, "An image's position is not plausible.")
    is_known = header.frames > 1 or (header.position and len(header.position) == 3)
    if manifest.selection.unit == "image" or is_known:  # a multi-frame's stand with its frames
        return None
    return Eligibility("position", "not stated", "x, y, z", "The images' positions are not stated.")


def _spacing(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    spacing = header.pixel_spacing
    if not manifest.pixels.needs_spacing or (spacing and all(value > 0 for value in spacing)):
        return None
    return Eligibility(
        "pixel_spacing", "not stated", "> 0 mm", "The size of a pixel is not stated."
    )


def _thickness(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    limits, thickness = manifest.selection.thickness_mm, header.slice_thickness
    if limits is None or thickness is None or limits[0] <= thickness <= limits[1]:
        return None
    allowed = f"{limits[0]:g}..{limits[1]:g} mm"
    return Eligibility(
        "thickness", f"{thickness:g} mm", allowed, "The slices are too thin or too thick."
    )


def _view(header: InstanceHeader, manifest: Manifest) -> Eligibility | None:
    selection, view = manifest.selection, header.view_position.upper()
    if not selection.views or view in selection.views:
        return None
    if not view and selection.unstated_view == "accept":
        return None
    allowed = " or ".join(selection.views)
    return Eligibility("view_position", view or "not stated", allowed, "Another view of the body.")


def _other_study(rule: str, value: str, allowed: tuple[str, ...], reason: str) -> Eligibility:
    return Eligibility(rule, value or "not stated", ", ".join(allowed), reason, is_applicable=False)


RULES: tuple[Rule, ...] = (
    _modality, _sop_class, _body_part,  # not applicable: silent
    _phantom, _image_type, _description, _colour, _depth, _lossy, _matrix, _rescale,
    _view, _orientation, _position, _spacing, _thickness, _kernel, _contrast,
)  # fmt: skip
