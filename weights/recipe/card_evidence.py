"""What the model card says beside the figures of merit: heat maps, other scanners, drawings."""

from collections.abc import Mapping, Sequence
from typing import Any

from weights.recipe.card_words import interval, table

_MAPS = {
    "model": "the model's",
    "untrained": "control: untrained head",
    "brightest": "control: brightest place inside the skull",
}
_PARTS = ("all", "detected")


def pointing(game: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = []
    for name, words in _MAPS.items():
        cells = [
            interval(game[part][f"{name}_{figure}"])
            for part in _PARTS
            for figure in ("hit", "energy")
        ]
        rows.append((words, *cells))
    beats = all(
        game["all"]["model_hit"]["value"] > game["all"][f"{name}_hit"]["value"]
        for name in ("untrained", "brightest")
    )
    counts = [f"{game[x]['slices']} slices, {game[x]['patients']} patients" for x in _PARTS]
    head = (
        "map",
        f"peak in a box ({counts[0]})",
        "energy in boxes",
        f"peak, detected patients ({counts[1]})",
        "energy, detected",
    )
    words = (
        f"Boxes cover {100 * game['box_share']:.0f} % of the inside of the skull: a blind guess. "
        "By peaks over all marked slices the model "
        f"{'beats' if beats else 'does not beat'} both controls: regions are "
        f"{'drawn' if beats else 'not drawn'} in reports. Method and layer chosen for each fold: "
        f"{'; '.join(game['explanations_by_fold'])}."
    )
    return f"{table(head, rows)}\n\n{words}"


def shift(shift: Mapping[str, Any] | None) -> str:
    if shift is None:
        return ""
    rows = [
        (
            way["way"],
            f"{way['percentile_of_negatives']:.0f} ({way['lowest']:.0f} to {way['highest']:.0f})",
            f"{way['slice_auc']:.3f}",
            f"{way['patient_auc']:.3f}",
        )
        for way in shift["ways"]
    ]
    head = ("way", "percentile, mean of the folds (range)", "slice AUC", "patient AUC")
    return (
        "Each outer fold's fit judges the series and its own patients; percentiles are among the "
        "negatives out of fold, AUCs are what a remedy costs. Noise from pixel to pixel: "
        f"{shift['noise_hu']:.1f} HU in the series, {shift['usual_noise_hu']:.1f} HU in the median "
        f"training patient (JPEG).\n\n{table(head, rows)}"
    )


def answers(families: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (name, x["slices"], f"{x['auc']:.2f}", f"{100 * x['rise']:.0f} %")
        for name, x in families.items()
    ]
    return table(("head", "slices", "slice AUC", "logit rises with the bleed"), rows)


def drawn(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            entry["kind"],
            ", ".join(f"{100 * chance:.0f} %" for chance in entry["probabilities"]),
            f"{entry['called']} of {len(entry['probabilities'])}",
        )
        for entry in entries
    ]
    return table(("drawn head", "probability of each", "called present"), rows)


def external(external: Mapping[str, Any] | None) -> str:
    if external is None:
        return "The series was not there when this card was written."
    if "refused" in external:
        return f"The bundle's own rules refuse it: {external['refused']}."
    return (
        f"Its {external['images']} images give a study logit of {external['study_logit']:.2f}, "
        f"probability {100 * external['probability']:.0f} % at the reference prevalence: "
        f"percentile {external['percentile_of_negatives']:.0f} of the out-of-fold negatives. "
        f"At the active threshold it is {'PRESENT' if external['present'] else 'absent'}, and the "
        f"node would call it {external['urgency']}."
    )
