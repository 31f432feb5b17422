"""Tenants: whose study it is, from the AE titles, and where the results go."""

import ipaddress
import re
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

# AE: 1 to 16 characters, no backslash or control characters, not only spaces (PS3.5 6.2).
# Leading and trailing spaces are not significant, so the configuration may not have them.
_AE_TITLE = re.compile(r"[!-\[\]-~]([ -\[\]-~]{0,14}[!-\[\]-~])?")


def _ae_title(text: str) -> str:
    if not _AE_TITLE.fullmatch(text):
        raise ValueError(
            "an AE title has 1 to 16 printable ASCII characters, no backslash, and no space at "
            "either end"
        )
    return text


AETitle = Annotated[str, AfterValidator(_ae_title)]
TenantId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
LaneName = Literal["stat", "urgent", "routine"]
Share = Annotated[float, Field(gt=0, lt=1)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sender(_Part):
    """A peer that may send studies to its tenant."""

    ae_title: AETitle
    hosts: tuple[str, ...] = ()  # addresses or networks; empty: any address
    tls_subject: str = ""  # set: this certificate subject is required
    lane: LaneName | None = None  # overrides the tenant's lane
    port: int = Field(default=0, ge=0, le=65535)  # where it listens, for storage commitment reports

    @field_validator("hosts")
    @classmethod
    def _networks(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            ipaddress.ip_network(host, strict=False)  # its ValueError names the address
        return hosts

    def admits(self, address: str) -> bool:
        """Whether a peer at `address` may call itself this sender."""
        if not self.hosts:
            return True
        peer = ipaddress.ip_address(address)
        if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped:
            peer = peer.ipv4_mapped
        return any(peer in ipaddress.ip_network(host, strict=False) for host in self.hosts)


class SendFlags(_Part):
    """Which objects a destination gets."""

    summary: bool = True
    overlay: bool = True
    sr: bool = True
    kos: bool = True
    pm: bool = False  # the heat maps as numbers: a Parametric Map, where the source has a geometry
    mfsc: bool = False  # overlays as frames of one Multi-frame Secondary Capture, not one by one
    not_processed: bool = False  # a page that says so where an analysis ends without a result


class Destination(_Part):
    """A PACS that receives the tenant's results."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,31}$")]
    ae_title: AETitle
    host: str = Field(min_length=1)
    port: int = Field(ge=1, le=65535)
    tls: bool = False
    tls_name: str = ""  # in the destination's certificate, where that is not `host`
    calling_ae: AETitle | None = None  # default: the tenant's first AE title
    commitment: bool = False  # ask for storage commitment
    expire_h: float = Field(default=240.0, gt=0)
    sr_sop_class: Literal["auto", "3d", "comprehensive", "enhanced"] = "auto"
    send: SendFlags = SendFlags()
    emit_negative: Literal["sr", "sr+summary", "none"] | None = None  # default: the tenant's
    series_base: int = Field(default=9900, ge=1, le=2_000_000)
    sc_compress: Literal["none", "rle"] = "none"
    sr_anchor_groups: bool = True
    content_qualification: Literal["RESEARCH", "PRODUCT"] = "RESEARCH"
    k: int | None = Field(default=None, ge=1, le=10)  # overlays at most; default: the bundle's


class Tenant(_Part):
    """One hospital: its AE titles, who may send, where results go, what looks at its studies."""

    id: TenantId
    ae_titles: tuple[AETitle, ...] = Field(min_length=1)
    quiet_period_s: float = Field(default=20.0, gt=0)  # silence that makes a whole series ready
    max_wait_s: float = Field(default=600.0, gt=0)  # then what is there is analysed, as PARTIAL
    max_study_age_days: int = Field(default=0, ge=0)  # 0: no limit
    #: Originals; 0: for good. Not enforced yet: all are kept.
    retention_days: int = Field(default=30, ge=0)
    lane: LaneName = "urgent"
    weight: int = Field(default=1, ge=1, le=100)  # share of the machine beside other tenants
    models: tuple[str, ...] = ("ich",)
    shadow: tuple[str, ...] = ()
    thresholds: dict[str, Share] = Field(default_factory=dict)  # "bundle.label" -> reference scale
    prevalence: dict[str, Share] = Field(default_factory=dict)  # "bundle.label" -> this site's
    emit_negative: Literal["sr", "sr+summary", "none"] = "sr+summary"
    senders: tuple[Sender, ...] = ()
    destinations: tuple[Destination, ...] = ()

    @field_validator("ae_titles")
    @classmethod
    def _distinct(cls, titles: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(titles)) != len(titles):
            raise ValueError("an AE title is listed twice")
        return titles

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [destination.name for destination in self.destinations]
        if len(set(names)) != len(names):
            raise ValueError(f"tenant {self.id}: two destinations have the same name")
        if self.quiet_period_s > self.max_wait_s:
            raise ValueError(
                f"tenant {self.id}: quiet_period_s {self.quiet_period_s:g} is longer than "
                f"max_wait_s {self.max_wait_s:g}, after which nothing is waited for"
            )
        if twice := set(self.models) & set(self.shadow):
            raise ValueError(f"tenant {self.id}: {sorted(twice)} both serve and run as shadow")
        for one in self.destinations:
            if one.commitment and self.calling_ae(one) not in self.ae_titles:
                raise ValueError(
                    f"tenant {self.id}: {one.name} would report on commitment to its calling_ae "
                    f"{one.calling_ae}, which is none of the tenant's ae_titles"
                )
        known = set(self.models) | set(self.shadow)
        for key in (*self.thresholds, *self.prevalence):
            bundle, dot, label = key.partition(".")
            if not (dot and label and bundle in known):
                raise ValueError(
                    f"tenant {self.id}: {key!r} is not <one of {sorted(known)}>.<label>"
                )
        return self

    def calling_ae(self, destination: Destination) -> str:
        return destination.calling_ae or self.ae_titles[0]

    @property
    def keeps_for_good(self) -> bool:
        """Whether originals are never deleted, so that storage commitment can be given."""
        return self.retention_days == 0

    def sender(self, ae_title: str, address: str) -> Sender | None:
        """The sender that a peer is, or None."""
        return next(
            (s for s in self.senders if s.ae_title == ae_title.strip() and s.admits(address)), None
        )

    def lane_of(self, ae_title: str) -> LaneName:
        """The lane of a study that this AE title sent."""
        own = next((s.lane for s in self.senders if s.ae_title == ae_title and s.lane), None)
        return own or self.lane
