"""MODEL_CARD.md: the prose of its template, with every table written from the figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from weights.recipe.card_evidence import answers, drawn, external, pointing, shift
from weights.recipe.card_short import FEW, drawn_bleeds, in_short
from weights.recipe.card_words import interval, table

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
        "headline": _headline(figures),
        "brier_alone": f"{figures['headline']['brier_of_prevalence_alone']:.2f}",
        "loss_alone": f"{figures['headline']['log_loss_of_prevalence_alone']:.2f}",
        "ece_if_perfect": _range(figures["headline"]["ece_if_perfect"]),
        "model": _model(figures["final"]),
        "compared": _compared(figures["compared"]),
        "other_splits": _other_splits(figures["other_splits"]),
        "predictive_values": _predictive_values(figures),
        "short": in_short(figures),
        "drawn_bleeds": drawn_bleeds(figures["drawn"]),
        "reliability": _reliability(figures["shipped_family"]["headline"]),
        "operating_points": _operating_points(figures),
        "active": figures["active"],
        "subgroups": _subgroups(figures["subgroups"]),
        "subtypes": _subtypes(figures["subtypes"]),
        "shortcuts": _shortcuts(figures["shortcuts"], figures["subgroups"]),
        "per_fold": _per_fold(figures),
        "refit": _refit(figures["final"]),
        "calibration": _calibration(figures["final"]),
        "pointing": pointing(figures["pointing_game"]),
        "external": external(figures["external"]),
        "shift": shift(figures["shift"]),
        "answers": answers(figures["answers_to_bleeds"]),
        "drawn": drawn(figures["drawn"]),
    }
    path.write_text(Template(_TEMPLATE.read_text()).substitute(values))


def _labels(figures: Mapping[str, Any]) -> str:
    data = figures["data"]
    slices = data["positive_slices"]
    return table(
        ("label", "positive patients", "positive slices"),
        [(name, n, slices[name]) for name, n in data["positive_patients"].items()],
    )


def _headline(figures: Mapping[str, Any]) -> str:
    procedure, family = figures["headline"], figures["shipped_family"]["headline"]
    chosen = {fold["family"] for fold in figures["per_fold"]}
    words = (
        "Both columns are of patients that no fit, calibration or threshold has seen; some choices "
        "of design have (below), so all figures are somewhat optimistic. *What ships*: that kind "
        "of model in every fold; all later tables are of it. *Whole procedure*: the kind is chosen "
        "inside each fold, too "
        f"({'not always the one that ships' if len(chosen) > 1 else 'always the one that ships'}); "
        "where the two differ, that is luck."
    )
    rows = [
        (name_words, interval(family[name]), interval(procedure[name]))
        for name, name_words in _HEADLINE.items()
    ]
    made = table(("figure", "what ships", "whole procedure"), rows)
    slope = family["calibration_slope"]
    if not slope["low"] <= 1 <= slope["high"]:
        side = "spread too little: high ones are too low" if slope["low"] > 1 else "too sure"
        made += f"\n\nThe slope's interval leaves 1 out: probabilities are {side}."
    return f"{words}\n\n{made}"


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
    return table(head, rows)


def _predictive_values(figures: Mapping[str, Any]) -> str:
    rows = []
    for name, point in figures["shipped_family"]["operating_points"].items():
        for at in point["predictive_values"]:
            if at["prevalence"] in _PREVALENCES:
                share = f"{100 * at['prevalence']:.0f} %"
                rows.append((name, share, interval(at["ppv"], 3), interval(at["npv"], 3)))
    return table(("operating point", "prevalence", "PPV", "NPV"), rows)


def _other_splits(splits: Sequence[Mapping[str, float]]) -> str:
    if not splits:
        return "Not done in this run (`--repeats`)."
    names = ("seed", "patient_auc", "slice_auc", "brier", "sensitivity", "specificity")
    head = ("split", "patient AUC", "slice AUC", "Brier", "sensitivity", "specificity")
    rows = [(split["seed"], *(f"{split[name]:.2f}" for name in names[1:])) for split in splits]
    return table(head, rows)


def _reliability(headline: Mapping[str, Any]) -> str:
    rows = [
        (part["n"], f"{100 * part['predicted']:.0f} %", f"{100 * part['observed']:.0f} %")
        for part in headline["reliability"]
    ]
    return table(("patients", "mean probability", "with hemorrhage"), rows)


def _operating_points(figures: Mapping[str, Any]) -> str:
    thresholds, own = figures["final"]["thresholds"], figures["final"]["at_own_thresholds"]
    return table(
        (
            "operating point",
            "threshold that ships",
            "sensitivity, each fold at its own threshold",
            "specificity",
            "at the threshold that ships, on the out-of-fold scores it was set on",
        ),
        [
            (
                name,
                thresholds[name],
                interval(point["sensitivity"]),
                interval(point["specificity"]),
                "{sensitivity:.2f} and {specificity:.2f}".format(**own[name]),
            )
            for name, point in figures["shipped_family"]["operating_points"].items()
        ],
    )


def _subgroups(subgroups: Mapping[str, Any]) -> str:
    return table(
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
    """`FEW` of either kind, or it is not said."""
    negative = part["patients"] - part["positive"]
    needed = {
        "sensitivity": part["positive"],
        "specificity": negative,
        "patient_auc": min(part["positive"], negative),
    }[key]
    return interval(part[key]) if needed >= FEW else f"not said (n = {needed})"


def _subtypes(subtypes: Mapping[str, Any]) -> str:
    return table(
        (
            "subtype",
            "patients",
            "of these, the only bleed",
            "slices",
            "found as `any`",
            "slice AUC",
        ),
        [
            (
                *(name, x["patients"], x["only_bleed"], x["slices"]),
                *(interval(x["found_as_any"]), interval(x["slice_auc"])),
            )
            for name, x in subtypes.items()
        ],
    )


def _shortcuts(shortcuts: Mapping[str, Any], subgroups: Mapping[str, Any]) -> str:
    bands = shortcuts["slice_auc_by_position_band"]
    inside = ", ".join(f"{name} {value:.2f}" for name, value in bands.items())
    return (
        f"- Slice position alone: slice AUC {shortcuts['slice_auc_of_position_alone']:.2f}. "
        f"The model inside bands of equal position: {inside}; inside positive patients "
        f"{shortcuts['slice_auc_within_positive_patients']:.2f} on average.\n"
        f"- Fracture alone: patient AUC {shortcuts['patient_auc_of_fracture_alone']:.2f}. "
        "The model among patients without a fracture: "
        f"{interval(shortcuts['patient_auc_without_fracture'])}." + _of_cohort(shortcuts, subgroups)
    )


def _of_cohort(shortcuts: Mapping[str, Any], subgroups: Mapping[str, Any]) -> str:
    """Sex and age alone, and the model inside each; nothing where they were not measured."""
    if "patient_auc_of_sex_alone" not in shortcuts:
        return ""
    inside = {name: _known(part, "patient_auc") for name, part in subgroups.items()}
    age = shortcuts["patient_auc_of_age_alone"]
    younger = " (under 0.5: here the younger bleed more often)" if age["value"] < 0.5 else ""
    return (
        "\n- Sex alone, men as the likelier to bleed: patient AUC "
        f"{interval(shortcuts['patient_auc_of_sex_alone'])}. The model among men: "
        f"{inside['male']}; among women: {inside['female']}.\n"
        "- Age alone, the older as the likelier: patient AUC "
        f"{interval(age)}{younger}. The model under 18: "
        f"{inside['under 18']}; from 18 on: {inside['18 and over']}."
    )


def _per_fold(figures: Mapping[str, Any]) -> str:
    rows = [(f"outer {i + 1}", fold) for i, fold in enumerate(figures["per_fold"])]
    rows.append(("all patients (ships)", figures["final"]))
    losses = figures["final"]["aggregation_log_losses"]
    ways = "; ".join(f"{how}: {loss:.3f}" for how, loss in losses.items())
    made = table(
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
    return (
        f"{made}\n\nFrom slices to patient, for what ships: log-loss, cross-fitted over patients, "
        f"of the best calibration each way allows: {ways}. `ranked` weighs the highest logits by "
        "learnt weights. noisy_or is only told, never chosen: it grows with the number of slices."
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
