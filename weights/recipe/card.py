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
    "calibration_intercept": "Calibration intercept, of that slope (0 is right)",
    "calibration_in_the_large": "Calibration in the large (0 is right)",
    "ece": "Expected calibration error, 5 equal-mass bins",
}
_MAPS = {
    "model": "the model's",
    "untrained": "control: untrained head",
    "brightest": "control: brightest place inside the skull",
}
_PARTS = ("all", "detected")
#: Predictive values are told at these.
_PREVALENCES = (0.01, 0.03, 0.05, 0.08, 0.10, 0.20)


def write_card(path: Path, figures: Mapping[str, Any]) -> None:
    """The card as Markdown."""
    values = {
        "bundle": figures["bundle"],
        "version": figures["version"],
        "network": figures["network"],
        "pretrained": figures["pretrained"],
        "n_patients": figures["data"]["patients"],
        "size": figures["input_pixels"],
        "n_slices": figures["data"]["slices"],
        "folds": figures["outer_folds"],
        "seed": figures["seed"],
        "labels": _labels(figures),
        "percent_positive": round(100 * figures["final"]["calibration"]["prevalence"]),
        "sex": _sex(figures["subgroups"]),
        "headline": _headline(figures["headline"]),
        "brier_alone": f"{figures['headline']['brier_of_prevalence_alone']:.2f}",
        "loss_alone": f"{figures['headline']['log_loss_of_prevalence_alone']:.2f}",
        "ece_if_perfect": _range(figures["headline"]["ece_if_perfect"]),
        "model": _model(figures["final"]),
        "compared": _compared(figures["compared"]),
        "other_splits": _other_splits(figures["other_splits"]),
        "predictive_values": _predictive_values(figures),
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
        "shift": _shift(figures["shift"]),
        "answers": _answers(figures["answers_to_bleeds"]),
        "drawn": _drawn(figures["drawn"]),
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


def _range(figure: Mapping[str, float]) -> str:
    return f"{figure['mean']:.2f} on average, {figure['low']:.2f} to {figure['high']:.2f}"


def _model(final: Mapping[str, Any]) -> str:
    return (
        f"`{final['candidate']}`; neighbours' say: {final['smoothing']}; "
        f"study: {final['aggregation']}; heat maps: {final['explanation']}"
    )


def _compared(entries: Sequence[Mapping[str, Any]]) -> str:
    names = ("slice_auc", "patient_auc", "brier", "slice_auc_gain", "patient_auc_gain")
    rows = [
        (entry["family"], *(interval(entry[n]) if n in entry else "" for n in names))
        for entry in entries
    ]
    head = ("candidate", "slice AUC", "patient AUC", "Brier", "slice AUC gain", "patient AUC gain")
    return _table(head, rows)


def _predictive_values(figures: Mapping[str, Any]) -> str:
    rows = []
    for name, point in figures["operating_points"].items():
        for at in point["predictive_values"]:
            if at["prevalence"] in _PREVALENCES:
                share = f"{100 * at['prevalence']:.0f} %"
                rows.append((name, share, interval(at["ppv"]), interval(at["npv"])))
    return _table(("operating point", "prevalence", "PPV", "NPV"), rows)


def _other_splits(splits: Sequence[Mapping[str, float]]) -> str:
    if not splits:
        return "Not done in this run (`--repeats`)."
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
        (
            "patients",
            "candidate",
            "neighbours' say",
            "aggregation",
            "calibration",
            *figures["operating_points"],
        ),
        [
            (
                name,
                *(x["family"], x["smoothing"], x["aggregation"], x["calibration"]["method"]),
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
        f"Boxes cover {100 * game['box_share_of_head']:.0f} % of the head: a blind guess. By peaks "
        f"over all marked slices the model {'beats' if beats else 'does not beat'} both controls: "
        f"regions are {'drawn' if beats else 'not drawn'} in reports. Method and layer chosen for "
        f"each fold: {'; '.join(game['explanations_by_fold'])}."
    )
    return f"{_table(head, rows)}\n\n{words}"


def _shift(shift: Mapping[str, Any] | None) -> str:
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
        f"training patient (JPEG).\n\n{_table(head, rows)}"
    )


def _answers(families: Mapping[str, Mapping[str, float]]) -> str:
    rows = [
        (name, x["slices"], f"{x['auc']:.2f}", f"{100 * x['rise']:.0f} %")
        for name, x in families.items()
    ]
    return _table(("head", "slices", "slice AUC", "logit rises with the bleed"), rows)


def _drawn(entries: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            entry["kind"],
            ", ".join(f"{100 * chance:.0f} %" for chance in entry["probabilities"]),
            f"{entry['called']} of {len(entry['probabilities'])}",
        )
        for entry in entries
    ]
    return _table(("drawn head", "probability of each", "called present"), rows)


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
