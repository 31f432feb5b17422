"""The model card's first lines: what a radiologist must know before anything else."""

from collections.abc import Mapping, Sequence
from typing import Any

from weights.recipe.card_words import interval
from weights.recipe.operating import STAT_PREVALENCE, is_worth_stat, stat_ppv

_FIRST = {
    "ich-b4": (
        "- **Not shown to be better than `ich` in any figure; it is here because this network was "
        "asked for. Use `ich`.**\n"
    )
}
_PREVALENCE = 0.05
#: An interval that rests on fewer of either kind says nothing.
FEW = 5


def in_short(figures: Mapping[str, Any]) -> str:
    """A list in Markdown."""
    data = figures["data"]
    at = figures["final"]["calibration"]["prevalence"]
    return _FIRST.get(figures["bundle"], "") + (
        "- A flag for heads that may show a bleed, from slices of a head CT. Research only; made "
        f"from **{data['patients']} patients of one hospital, {data['positive_patients']['any']} "
        "of whom bleed**; never tried against radiologists, prospectively, or on a second "
        "hospital's labelled scans.\n"
        f"{_auc(figures)}"
        f"- {_flags(figures)}. {_stat(figures)}.\n"
        f"- {_elsewhere(figures['external'])}\n"
        f"- {drawn_bleeds(figures['drawn'])}. Drawings are no patients; still, it reads much of "
        "what comes with a bleed.\n"
        f"- All percents here assume that {100 * at:.0f} % of patients bleed: {_shown(at)}. A site "
        "sets its own share, and is then shown others.\n"
        "- No flag is no finding: it does not say that a head is clear."
    )


def _auc(figures: Mapping[str, Any]) -> str:
    """The headline, and what of it is left where sex cannot tell."""
    whole = figures["shipped_family"]["headline"]["patient_auc"]
    men = figures["subgroups"].get("male", {"patients": 0, "positive": 0})
    if min(men["positive"], men["patients"] - men["positive"]) < FEW:
        return f"- Patient AUC out of fold {interval(whole)}.\n"
    return (
        f"- Patient AUC out of fold {interval(whole)}; **among men alone "
        f"{interval(men['patient_auc'])}**: {men['positive']} of the "
        f"{figures['data']['positive_patients']['any']} who bleed are men, and a head may tell "
        "its sex.\n"
    )


def _shown(at: float) -> str:
    odds = 0.9 / 0.1 * (1 - at) / at * _PREVALENCE / (1 - _PREVALENCE)
    return f"90 % is {100 * odds / (1 + odds):.0f} % where {100 * _PREVALENCE:.0f} % bleed"


def _elsewhere(external: Mapping[str, Any] | None) -> str:
    if external is None or "refused" in external:
        return "No scan from another scanner was judged."
    called = f"called {external['urgency']}" if external["present"] else "not flagged"
    return (
        f"**The one scan from another scanner, with no visible bleed by a layman's reading, was "
        f"{called}** ({100 * external['probability']:.0f} %; below)."
    )


def _flags(figures: Mapping[str, Any]) -> str:
    """Of 1000 scans where 5 % bleed, at the active threshold."""
    point = figures["shipped_family"]["operating_points"][figures["active"]]
    own = figures["final"]["at_own_thresholds"][figures["active"]]
    on = min(point["sensitivity"]["value"], own["sensitivity"])
    off = min(point["specificity"]["value"], own["specificity"])
    return (
        f"Of 1000 heads of which 50 bleed, about {50 * on:.0f} of the 50 would be flagged and "
        f"{50 * (1 - on):.0f} missed, beside about {950 * (1 - off):.0f} false flags (the lower "
        "sensitivity and specificity of the table of operating points)"
    )


def _stat(figures: Mapping[str, Any]) -> str:
    """How often STAT is said, by the point at which it begins."""
    point = figures["shipped_family"]["operating_points"]["high specificity"]
    false = f"{100 * (1 - stat_ppv(point)):.0f} %"
    if not is_worth_stat(point):
        return (
            f"None is called STAT: at `high specificity` {false} of the calls would be false where "
            f"{100 * STAT_PREVALENCE:.0f} % bleed"
        )
    return (
        f"STAT begins at `high specificity`: {100 * (1 - point['sensitivity']['value']):.0f} % of "
        f"the bleeds get none, and where {100 * STAT_PREVALENCE:.0f} % bleed, {false} of all STATs "
        "are false"
    )


def drawn_bleeds(entries: Sequence[Mapping[str, Any]]) -> str:
    """What the drawn heads say in one sentence."""
    bleeding = [x for x in entries if "bleed" in x["kind"] and "no bleed" not in x["kind"]]
    called = sum(x["called"] for x in bleeding)
    total = sum(len(x["probabilities"]) for x in bleeding)
    large = [x for x in bleeding if "large" in x["kind"]]
    of_large = sum(len(x["probabilities"]) for x in large)
    others = [x for x in entries if x not in bleeding and x["called"]]
    words = (
        f"Of {total} drawn heads with a bleed {called} were called, of {of_large} with a large one "
        f"{sum(x['called'] for x in large)}"
    )
    if others:
        kinds = ", ".join(f"{x['kind']} ({x['called']})" for x in others)
        words += f"; called without any bleed: {kinds}"
    return words
