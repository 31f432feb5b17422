"""MODEL_CARD.md: the prose of its template, with every table written from the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

_TEMPLATE = Path(__file__).with_name("MODEL_CARD.template.md")
_HEADLINE = {
    "patient_auc": "Patient AUC",
    "slice_auc": "Slice AUC",
    "brier": "Brier score (patients)",
    "log_loss": "Log-loss (patients)",
    "calibration_slope": "Calibration slope (1 is right, less is too sure)",
    "calibration_in_the_large": "Calibration in the large (0 is right)",
}


def write_card(path: Path, figures: Mapping[str, Any]) -> None:
    """The card as Markdown."""
    values = {
        "version": figures["version"],
        "n_patients": figures["data"]["patients"],
        "n_slices": figures["data"]["slices"],
        "folds": figures["outer_folds"],
        "seed": figures["seed"],
        "labels": _labels(figures),
        "percent_positive": round(100 * figures["final"]["calibration"]["prevalence"]),
        "sex": _sex(figures["subgroups"]),
        "headline": _headline(figures["headline"]),
        "brier_alone": f"{figures['headline']['brier_of_prevalence_alone']:.2f}",
        "loss_alone": f"{figures['headline']['log_loss_of_prevalence_alone']:.2f}",
        "other_splits": _other_splits(figures["other_splits"]),
        "reliability": _reliability(figures["headline"]),
        "operating_points": _operating_points(figures),
        "active": figures["active"],
        "subgroups": _subgroups(figures["subgroups"]),
        "subtypes": _subtypes(figures["subtypes"]),
        "shortcuts": _shortcuts(figures["shortcuts"]),
        "per_fold": _per_fold(figures),
        "refit": _refit(figures["final"]),
        "calibration": _calibration(figures["final"]),
        "pointing": _pointing(figures["pointing_game"]),
        "external": _external(figures["external"]),
    }
    path.write_text(Template(_TEMPLATE.read_text()).substitute(values))


def interval(figure: Mapping[str, float]) -> str:
    """`0.83 (0.73 to 0.91)`"""
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _labels(figures: Mapping[str, Any]) -> str:
    data = figures["data"]
    slices = data["positive_slices"]
    return _table(
        ("label", "positive patients", "positive slices"),
        [(name, n, slices[name]) for name, n in data["positive_patients"].items()],
    )


def _headline(headline: Mapping[str, Any]) -> str:
    return _table(
        ("figure", "value (95 % interval)"),
        [(words, interval(headline[name])) for name, words in _HEADLINE.items()],
    )


def _other_splits(splits: Sequence[Mapping[str, float]]) -> str:
    names = ("seed", "patient_auc", "slice_auc", "brier", "sensitivity", "specificity")
    head = ("split", "patient AUC", "slice AUC", "Brier", "sensitivity", "specificity")
    rows = [(split["seed"], *(f"{split[name]:.2f}" for name in names[1:])) for split in splits]
    return _table(head, rows)


def _reliability(headline: Mapping[str, Any]) -> str:
    rows = [
        (part["n"], f"{100 * part['predicted']:.0f} %", f"{100 * part['observed']:.0f} %")
        for part in headline["reliability"]
    ]
    return _table(("patients", "mean probability", "with hemorrhage"), rows)


def _operating_points(figures: Mapping[str, Any]) -> str:
    thresholds = figures["final"]["thresholds"]
    return _table(
        ("operating point", "threshold that ships", "sensitivity", "specificity"),
        [
            (name, thresholds[name], interval(point["sensitivity"]), interval(point["specificity"]))
            for name, point in figures["operating_points"].items()
        ],
    )


def _subgroups(subgroups: Mapping[str, Any]) -> str:
    return _table(
        ("patients", "n", "positive", "patient AUC", "sensitivity", "specificity"),
        [
            (
                name,
                part["patients"],
                part["positive"],
                *(_known(part, key) for key in ("patient_auc", "sensitivity", "specificity")),
            )
            for name, part in subgroups.items()
        ],
    )


def _sex(subgroups: Mapping[str, Any]) -> str:
    parts = (f"{x['positive']} of {x['patients']} {n}" for n, x in subgroups.items() if "male" in n)
    return f"{' and '.join(parts)} patients bleed"


def _known(part: Mapping[str, Any], key: str) -> str:
    """An interval that rests on fewer than five of either kind says nothing."""
    negative = part["patients"] - part["positive"]
    needed = {
        "sensitivity": part["positive"],
        "specificity": negative,
        "patient_auc": min(part["positive"], negative),
    }[key]
    return interval(part[key]) if needed >= 5 else f"not said (n = {needed})"


def _subtypes(subtypes: Mapping[str, Any]) -> str:
    return _table(
        ("subtype", "patients", "slices", "found as `any`", "slice AUC of its own output"),
        [
            (n, x["patients"], x["slices"], interval(x["found_as_any"]), interval(x["slice_auc"]))
            for n, x in subtypes.items()
        ],
    )


def _shortcuts(shortcuts: Mapping[str, Any]) -> str:
    bands = shortcuts["slice_auc_by_position_band"]
    inside = ", ".join(f"{name} {value:.2f}" for name, value in bands.items())
    return (
        f"- Slice position alone: slice AUC {shortcuts['slice_auc_of_position_alone']:.2f}. "
        f"The model inside bands of equal position: {inside}; inside positive patients "
        f"{shortcuts['slice_auc_within_positive_patients']:.2f} on average.\n"
        f"- Fracture alone: patient AUC {shortcuts['patient_auc_of_fracture_alone']:.2f}. "
        "The model among patients without a fracture: "
        f"{interval(shortcuts['patient_auc_without_fracture'])}."
    )


def _per_fold(figures: Mapping[str, Any]) -> str:
    rows = [(f"outer {i + 1}", fold) for i, fold in enumerate(figures["per_fold"])]
    rows.append(("all patients (ships)", figures["final"]))
    return _table(
        ("patients", "C", "balance", "aggregation", "calibration", *figures["operating_points"]),
        [
            (
                name,
                *(x["c"], x["balance"], x["aggregation"], x["calibration"]["method"]),
                *(f"{value:.2f}" for value in x["thresholds"].values()),
            )
            for name, x in rows
        ],
    )


def _refit(final: Mapping[str, Any]) -> str:
    return (
        f"study logits move by {final['refit_shift_positive']:+.2f} on positive and "
        f"{final['refit_shift_negative']:+.2f} on negative training patients; its patient AUC on "
        f"them is {final['refit_patient_auc_on_training_patients']:.2f} against "
        f"{final['inner_patient_auc']:.2f} out of fold"
    )


def _calibration(final: Mapping[str, Any]) -> str:
    losses = ", ".join(f"{k} {v:.3f}" for k, v in final["calibration_log_losses"].items())
    chosen = final["calibration"]
    return f"`{chosen['method']}` (cross-fitted log-loss: {losses}; {chosen['note']})"


def _pointing(game: Mapping[str, Any]) -> str:
    rows: list[tuple[object, ...]] = [
        ("Grad-CAM of `any`", interval(game["model"])),
        ("control: untrained head", interval(game["untrained"])),
        ("control: brightest place inside the skull", interval(game["brightest"])),
        (
            "share of the head that the boxes cover (a blind guess)",
            f"{game['box_share_of_head']:.2f}",
        ),
    ]
    beats = all(game["model"]["value"] > game[k]["value"] for k in ("untrained", "brightest"))
    words = f"It {'beats' if beats else 'does not beat'} both: regions are drawn only if it does."
    head = (f"peak on a lesion ({game['slices']} slices, {game['patients']} patients)", "share")
    return f"{_table(head, rows)}\n\n{words}"


def _external(external: Mapping[str, Any] | None) -> str:
    if external is None:
        return "The series was not there when this card was written."
    if "refused" in external:
        return f"The bundle's own rules refuse it: {external['refused']}."
    return (
        f"Its {external['images']} images give a study logit of {external['study_logit']:.2f}, "
        f"probability {100 * external['probability']:.0f} % at the reference prevalence: "
        f"percentile {external['percentile_of_negatives']:.0f} of the out-of-fold negatives. "
        f"At the active threshold it is {'PRESENT' if external['present'] else 'absent'}."
    )
