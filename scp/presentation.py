"""Presentation contexts: every storage class is supported, in every transfer syntax proposed."""

from collections.abc import Sequence

from pydicom.uid import UID
from pynetdicom.presentation import PresentationContext
from pynetdicom.service_class import (
    NonPatientObjectStorageServiceClass,
    ServiceClass,
    StorageServiceClass,
)
from pynetdicom.sop_class import uid_to_service_class

VERIFICATION = "1.2.840.10008.1.1"
_STANDARD_ROOT = "1.2.840.10008."
_STORAGE_ROOT = "1.2.840.10008.5.1.4.1.1."


def is_storage(sop_class: str) -> bool:
    """Whether a SOP class is stored: known storage, unknown storage, or private (PS3.4 B.1)."""
    service = uid_to_service_class(UID(sop_class))
    if service in (StorageServiceClass, NonPatientObjectStorageServiceClass):
        return True
    if service is not ServiceClass:  # a known service of another kind
        return False
    # A storage class younger than pynetdicom's dictionary, or a manufacturer's own.
    return sop_class.startswith(_STORAGE_ROOT) or not sop_class.startswith(_STANDARD_ROOT)


def is_verification_only(requested: Sequence[PresentationContext]) -> bool:
    return all(context.abstract_syntax == VERIFICATION for context in requested)


def supported(
    requested: Sequence[PresentationContext], *, storage: bool
) -> list[PresentationContext]:
    """What we support of what is requested, for pynetdicom's own negotiation.

    A context is supported in every transfer syntax that was proposed for its class: bytes are kept
    as they come. Of several in one context the first is taken, as the requestor ordered them.
    """
    syntaxes: dict[str, list[str]] = {}
    for context in requested:
        name = str(context.abstract_syntax)
        if name == VERIFICATION or (storage and is_storage(name)):
            known = syntaxes.setdefault(name, [])
            known += [syntax for syntax in context.transfer_syntax if syntax not in known]
    return [_context(name, known) for name, known in syntaxes.items() if known]


def well_formed(requested: Sequence[PresentationContext]) -> list[PresentationContext]:
    """Without contexts that name no class or propose no syntax: those cannot be answered."""
    return [c for c in requested if c.abstract_syntax and c.transfer_syntax]


def _context(abstract_syntax: str, transfer_syntaxes: list[str]) -> PresentationContext:
    context = PresentationContext()
    context.abstract_syntax = UID(abstract_syntax)
    context.transfer_syntax = list(transfer_syntaxes)
    return context
