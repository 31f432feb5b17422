"""The families of candidates of each bundle, by name: known before anything slow begins."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from db.errors import PermanentError

_EVIDENCE = "evidence tf_efficientnet_{} with drawn bleeds"

#: By bundle: those that it can hold, in the order of `line_up`.
SHIPPING: Mapping[str, tuple[str, ...]] = {
    "ich": (
        "linear tf_efficientnet_lite0",
        "linear tf_efficientnet_lite2",
        _EVIDENCE.format("lite0"),
        _EVIDENCE.format("lite2"),
        f"{_EVIDENCE.format('lite0')} tuned behind stage 3",
    ),
    "ich-b4": (
        "evidence efficientnet_b4 with drawn bleeds taught by tf_efficientnet_lite0",
        "evidence efficientnet_b4 with drawn bleeds",
    ),
}
#: And those that are only compared with them.
COMPARED: Mapping[str, tuple[str, ...]] = {
    "ich": (
        "gru over slices tf_efficientnet_lite0",
        "attention over slices tf_efficientnet_lite0",
        "convolution over slices tf_efficientnet_lite0",
        f"mean of {_EVIDENCE.format('lite0')} and linear tf_efficientnet_lite2",
        f"mean of {_EVIDENCE.format('lite0')} and {_EVIDENCE.format('lite2')}",
        f"{_EVIDENCE.format('lite2')} tuned behind stage 3",
    ),
    "ich-b4": (_EVIDENCE.format("lite0"),),
}


class NoSuchFamily(PermanentError):
    """A family of candidates that the recipe does not have."""

    code: ClassVar[str] = "no_such_family"


def check_families(wanted: Sequence[str], shipping: Sequence[str], compared: Sequence[str]) -> None:
    """None wanted: all.

    Raises
    ------
    NoSuchFamily
        If one is asked for that there is not, or none that may ship.
    """
    known = (*shipping, *compared)
    if strange := sorted(set(wanted) - set(known)):
        raise NoSuchFamily(f"no family {', '.join(strange)}; there are: {', '.join(known)}")
    if wanted and not set(wanted) & set(shipping):
        raise NoSuchFamily(f"no bundle can hold {', '.join(wanted)} alone")
