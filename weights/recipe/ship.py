"""From what the recipe chose to a bundle on disk that loads and gives its own reference."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference.bundle import CALIBRATION, load_bundle
from inference.manifest import Aggregation
from inference.model import check_reference, load_model
from weights.recipe import bundle_files
from weights.recipe.candidates.candidate import CAM_WORDS, Explanation, Servable, servable
from weights.recipe.data import LABELS
from weights.recipe.nested import Chosen
from weights.recipe.operating import is_worth_stat
from weights.recipe.template import Kind

#: Of the bundles as they are made now; weights of their own get a number of their own.
VERSION = "2.2.0"

#: The operating point that serves.
ACTIVE = "balanced"


def ship(
    out: Path, kind: Kind, final: Chosen, how: Explanation, figures: Mapping[str, Any]
) -> None:
    """The bundle's files; then loaded as the node loads them, it must give its own reference."""
    candidate = servable(final.candidate)
    network = candidate.network(final.fit.weights, final.smoothing.mix(len(LABELS)))
    sha256 = bundle_files.write_weights(out, network)
    bundle_files.write_manifest(out, kind, _measured(sha256, final, how, figures))
    bundle_files.write_reference(out, network)
    bundle_files.write_calibration(
        out / CALIBRATION,
        {LABELS[0]: final.calibration},
        fitted_on=f"{figures['data']['patients']} patients of ct-ich, "
        f"out of {figures['outer_folds']} folds by patient",
    )
    bundle = load_bundle(out)
    check_reference(bundle, load_model(bundle))


def _measured(
    sha256: str, final: Chosen, how: Explanation, figures: Mapping[str, Any]
) -> dict[str, Any]:
    points, own = (
        figures["shipped_family"]["operating_points"],
        figures["final"]["at_own_thresholds"],
    )
    thresholds = {name: round(value, 4) for name, value in final.thresholds.items()}
    return {
        "version": VERSION,
        "architecture": servable(final.candidate).architecture,
        "pretrained": servable(final.candidate).pretrained,
        "evidence": _evidence_lines(servable(final.candidate)),
        "weights_sha256": sha256,
        "prevalence": final.calibration.prevalence,
        "threshold": thresholds[ACTIVE],
        "active": ACTIVE,
        "stat_rule": _stat_rule(points["high specificity"], thresholds["high specificity"]),
        "operating_points": "".join(
            "[[labels.operating_points]]\n"
            f'name = "{name}"\nthreshold = {threshold}\n'
            # Folds had thresholds of their own: who reads one number gets the lower of the two.
            f"sensitivity = {min(points[name]['sensitivity']['value'], own[name]['sensitivity'])}\n"
            f"specificity = {min(points[name]['specificity']['value'], own[name]['specificity'])}\n"
            for name, threshold in thresholds.items()
        ),
        "aggregation": _aggregation_line(final.aggregation),
        "context": final.smoothing.context,
        "method": how.method,
        "cam": CAM_WORDS[how.method],
        "layer": how.layer,
        "pointing_game": _pointing_lines(figures["pointing_game"]["all"]),
    }


def _stat_rule(point: Mapping[str, Any], threshold: float) -> str:
    """Nothing where most of its calls would be false: what is present is then URGENT."""
    if not is_worth_stat(point):
        return ""
    return (
        f'[[study.urgency]]\nlabel = "{LABELS[0]}"\nlevel = "STAT"\n'
        f'at = {threshold}  # the operating point "high specificity"\n'
    )


def _aggregation_line(how: Aggregation) -> str:
    weights = f", weights = {list(how.weights)}" if how.weights else ""
    return f'{{ kind = "{how.kind}", k = {how.k}{weights} }}'


def _evidence_lines(candidate: Servable) -> str:
    spec = candidate.evidence
    if spec is None:
        return ""
    values = asdict(spec) | {"stages": list(spec.stages)}
    return "\n[evidence]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


def _pointing_lines(game: Mapping[str, Any]) -> str:
    """Nothing, where no slice was marked."""
    names = {"": "model_hit", "_untrained": "untrained_hit", "_brightest": "brightest_hit"}
    return "".join(
        f"pointing_game{suffix} = {game[name]['value']}\n"
        for suffix, name in names.items()
        if game[name] is not None
    )
