"""From a volume to a finding in steps: prepare, (the model), make_finding, make_heatmaps.

Pure: no disk, clock or network. The steps are apart because batches hold images of several studies.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from db.errors import PermanentError
from db.result import (
    CalibratedProbability,
    Finding,
    ImageRef,
    KeyImage,
    LabelResult,
    RawScore,
    Urgency,
)
from inference import heatmap
from inference.bundle import Bundle
from inference.calibration import calibrate, implied
from inference.manifest import Aggregation, UrgencyRule
from inference.model import logits as score
from inference.volume import Volume
from inference.window import ModelInput, model_input

Logits = NDArray[np.float32]
_SEVERITY = (Urgency.STAT, Urgency.URGENT, Urgency.ROUTINE)


class BadOutput(PermanentError):
    """The model gave something other than one finite logit a label and input."""

    code: ClassVar[str] = "model_output"


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A volume as the model sees it, and all that a finding needs of it; no source pixels."""

    seen: ModelInput
    refs: tuple[ImageRef, ...]
    notes: tuple[str, ...]
    is_partial: bool  # holes, or less than the manifest's coverage

    @property
    def inputs(self) -> NDArray[np.float32]:
        """(n, channels, size, size)"""
        return self.seen.inputs


def prepare(volume: Volume, bundle: Bundle) -> Prepared:
    """Model inputs of a volume that the pixel rules accepted."""
    manifest = bundle.manifest
    seen = model_input(volume, manifest.pixels, manifest.input)
    notes = volume.notes
    if len(seen.sources) < len(volume.refs):
        notes += (f"{len(volume.refs)} thin images were averaged to {len(seen.sources)}",)
    is_short = (
        volume.positions_mm is not None and volume.coverage_mm < manifest.selection.min_coverage_mm
    )
    return Prepared(seen, volume.refs, notes, bool(volume.holes) or is_short)


def make_finding(
    prepared: Prepared,
    outputs: Logits,
    bundle: Bundle,
    *,
    started_at: str,
    result_uuid: str,
    numerics: str = "fp32",
    thresholds: Mapping[str, float] | None = None,
    prevalence: Mapping[str, float] | None = None,
    is_partial: bool = False,
) -> Finding:
    """What the model's outputs say of the study.

    Parameters
    ----------
    outputs : shape (inputs, outputs), as the model gives them
    started_at : ISO 8601 UTC
    thresholds, prevalence : a tenant's own, {"bundle.label": number}; thresholds on the reference
    scale
    is_partial : whether readiness gave up waiting for the rest

    Raises
    ------
    BadOutput
        If an output is not finite, or there are too few or too many.
    """
    manifest = bundle.manifest
    if outputs.shape != (len(prepared.inputs), manifest.outputs) or not np.isfinite(outputs).all():
        raise BadOutput(f"{manifest.name}: outputs of shape {outputs.shape}, or not finite")
    logits = in_context(outputs, manifest.study.context)
    labels = _labels(prepared, logits, bundle, thresholds or {}, prevalence or {})
    per_image = _image_logits(prepared, logits)
    return Finding(
        result_uuid=result_uuid,
        started_at=started_at,
        model=bundle.identity(numerics),
        images=prepared.refs,
        labels=labels,
        image_logits={
            label.label: tuple(per_image[:, i].tolist()) for i, label in enumerate(labels)
        },
        key_images=_key_images(prepared, logits, labels, manifest.explain.key_images),
        urgency=urgency(labels, manifest.study.urgency),
        output=manifest.output,
        is_partial=is_partial or prepared.is_partial,
        notes=prepared.notes,
        shows_regions=manifest.explain.shows_regions,
    )


def make_heatmaps(
    prepared: Prepared, finding: Finding, bundle: Bundle, model: nn.Module
) -> tuple[Finding, list[NDArray[np.float32]]]:
    """Grad-CAM of each key image in its source matrix; the finding with their scale and regions.

    model : an eager fp32 copy. The maps are raw (ReLU, never stretched): all share one scale.
    """
    if not finding.key_images:
        return finding, []
    seen, names = prepared.seen, [label.id for label in bundle.manifest.labels]
    which = [_input_of(seen, key.image) for key in finding.key_images]
    context, n = bundle.manifest.study.context, len(seen.inputs)
    targets = [
        own_say(names.index(key.label), len(names), len(neighbourhood(index, n, context)), context)
        for index, key in zip(which, finding.key_images, strict=True)
    ]
    how = bundle.manifest.explain
    raw = heatmap.grad_cam(model, how.layer, seen.inputs[which], targets, how.method)
    maps = []
    for index, cam, key in zip(which, raw, finding.key_images, strict=True):
        ref = finding.images[key.image]
        maps.append(heatmap.to_source(cam, seen, index)[: ref.rows, : ref.columns])
    keys = finding.key_images
    if finding.shows_regions:
        pairs = zip(keys, maps, strict=True)
        keys = tuple(replace(key, region=heatmap.region(cam)) for key, cam in pairs)
    scale = float(max(cam.max() for cam in maps))
    return replace(finding, map_scale=scale, key_images=keys), maps


def predict(
    volume: Volume,
    bundle: Bundle,
    model: nn.Module,
    *,
    started_at: str,
    result_uuid: str,
    thresholds: Mapping[str, float] | None = None,
    prevalence: Mapping[str, float] | None = None,
) -> tuple[Finding, list[NDArray[np.float32]]]:
    """All steps for one study, in fp32 on the model's device."""
    prepared = prepare(volume, bundle)
    finding = make_finding(
        prepared,
        score(model, prepared.inputs),
        bundle,
        started_at=started_at,
        result_uuid=result_uuid,
        thresholds=thresholds,
        prevalence=prevalence,
    )
    return make_heatmaps(prepared, finding, bundle, model)


def in_context(outputs: NDArray[np.floating], context: int) -> Logits:
    """What the model gives of each image -> the images' logits.

    Without context they are the same. With it the model gives two numbers a label: one for the
    image itself, and one for its neighbourhood, whose mean over the image and `context` images on
    each side (fewer at the ends) is added. So a linear layer on the mean of neighbouring images'
    features needs no features to travel: the mean is taken behind the layer, not before it.

    outputs : shape (n, labels), or (n, 2 * labels) with context; in order along the normal
    """
    if not context:
        return outputs.astype(np.float32)
    own, beside = np.split(outputs, 2, axis=1)
    n = len(outputs)
    means = [beside[neighbourhood(i, n, context)].mean(axis=0) for i in range(n)]
    made: Logits = (own + np.stack(means)).astype(np.float32)
    return made


def neighbourhood(index: int, n: int, context: int) -> range:
    """The images that have a say in one's logits, itself among them."""
    return range(max(index - context, 0), min(index + context + 1, n))


def own_say(label: int, n_labels: int, n_beside: int, context: int) -> dict[int, float]:
    """How an image's own outputs weigh in its logit of a label: {output: weight}."""
    return {label: 1.0, n_labels + label: 1.0 / n_beside} if context else {label: 1.0}


def aggregate(logits: Sequence[float] | NDArray[np.floating], how: Aggregation) -> float:
    """One study logit from the images' logits, shape (n,), in order along the normal.

    max, topk_mean: of the logits. noisy_or: at least one of independent images. smoothed_max: the
    maximum of a running mean over k images, of those there are at the ends. ranked: a weighted mean
    of the highest logits, the highest first; of fewer images the lowest stands for those missing.
    """
    values = np.asarray(logits, dtype=np.float64)
    if how.kind == "max":
        return float(values.max())
    if how.kind == "topk_mean":
        return float(np.sort(values)[-how.k :].mean())
    if how.kind == "noisy_or":
        # -log of the chance that none shows it; log(exp(x) - 1) is its log-odds turned round.
        none = float(np.logaddexp(0.0, values).sum())
        return none + math.log(-math.expm1(-none))
    if how.kind == "ranked":
        ranked = np.sort(values)[::-1][: how.k]
        ranked = np.pad(ranked, (0, how.k - len(ranked)), mode="edge")
        return float(np.average(ranked, weights=how.weights))
    half = how.k // 2
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return float(max(window.mean() for window in windows))


def study_scores(
    logits: Logits, bundle: Bundle, prevalence: Mapping[str, float]
) -> tuple[list[RawScore], dict[str, CalibratedProbability]]:
    """The study's raw score of every label, and the probability of each that is calibrated.

    logits : shape (images, labels), in context
    prevalence : a tenant's own, {"bundle.label": number}
    """
    manifest = bundle.manifest
    raws = [RawScore(aggregate(column, manifest.study.aggregation)) for column in logits.T]
    chances: dict[str, CalibratedProbability] = {}
    for spec, raw in zip(manifest.labels, raws, strict=True):
        if spec.reference_prevalence is not None:
            chances[spec.id] = calibrate(
                raw,
                bundle.calibrations[spec.id],
                reference_prevalence=spec.reference_prevalence,
                site_prevalence=prevalence.get(f"{bundle.name}.{spec.id}"),
            )
    chances = implied(
        chances,
        {spec.id: spec.implies for spec in manifest.labels},
        {spec.id: spec.reference_prevalence or 0.0 for spec in manifest.labels},
    )
    return raws, chances


def urgency(labels: Sequence[LabelResult], rules: Sequence[UrgencyRule]) -> Urgency:
    """The most urgent rule that a present label fulfils; a negative study is ROUTINE."""
    by_id = {label.label: label for label in labels}
    met = {rule.level for rule in rules if _is_met(by_id[rule.label], rule)}
    return next((level for level in _SEVERITY if level in met), Urgency.ROUTINE)


def _is_met(label: LabelResult, rule: UrgencyRule) -> bool:
    if not label.is_present or label.probability is None:
        return False
    return rule.at is None or label.probability.reference >= rule.at


def _labels(
    prepared: Prepared,
    logits: Logits,
    bundle: Bundle,
    thresholds: Mapping[str, float],
    prevalence: Mapping[str, float],
) -> tuple[LabelResult, ...]:
    manifest = bundle.manifest
    raws, chances = study_scores(logits, bundle, prevalence)
    return tuple(
        LabelResult(
            label=spec.id,
            words=spec.words,
            code=spec.code,
            status=spec.status,
            raw=raw,
            probability=chances.get(spec.id),
            threshold=(
                None
                if spec.threshold is None
                else thresholds.get(f"{bundle.name}.{spec.id}", spec.threshold)
            ),
            top_image=prepared.seen.centre(int(np.argmax(column))),
        )
        for spec, raw, column in zip(manifest.labels, raws, logits.T, strict=True)
    )


def _image_logits(prepared: Prepared, logits: Logits) -> Logits:
    """(inputs, labels) -> (images, labels): every image of a slab has its slab's logits."""
    spread = np.empty((len(prepared.refs), logits.shape[1]), np.float32)
    for row, group in zip(logits, prepared.seen.sources, strict=True):
        spread[list(group)] = row
    return spread


def _key_images(
    prepared: Prepared, logits: Logits, labels: Sequence[LabelResult], most: int
) -> tuple[KeyImage, ...]:
    """The images that speak most for the label in question, in order; none in a negative study.

    That is the primary label where it is present, else the present one furthest over its threshold.
    """
    present = [i for i, label in enumerate(labels) if label.is_present]
    if not present:
        return ()
    which = 0 if labels[0].is_present else max(present, key=lambda i: _margin(labels[i]))
    scores = logits[:, which]
    best = np.argsort(-scores, kind="stable")[:most]
    return tuple(
        KeyImage(prepared.seen.centre(i), labels[which].label, RawScore(float(scores[i])), None)
        for i in sorted(best.tolist())
    )


def _margin(label: LabelResult) -> float:
    if label.probability is None or label.threshold is None:
        return -math.inf
    return label.probability.reference - label.threshold


def _input_of(seen: ModelInput, image: int) -> int:
    return next(i for i, group in enumerate(seen.sources) if image in group)
