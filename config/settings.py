"""Every knob of the node: one TOML file, overridden by the environment, read once at start."""

import ipaddress
import os
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from config.tenants import Tenant
from config.where import line_of

DEFAULT_CONFIG = Path("config/vigil.toml")


class SettingsError(Exception):
    """The configuration cannot be used; the message names file, line, key and reason."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NodeSettings(_Part):
    data_dir: Path = Path("var")  # spool/, store/, results/, database/
    database_url: SecretStr = SecretStr("")  # empty: embedded PostgreSQL under data_dir
    serial: str = Field(default="vigil-1", pattern=r"^[A-Za-z0-9._-]{1,32}$")  # DeviceSerialNumber
    min_free_mb: int = Field(
        default=1024, ge=0
    )  # disk watermark: below it reception answers 0xA700
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class ScpSettings(_Part):
    host: str = "127.0.0.1"
    port: int = Field(default=11112, ge=0, le=65535)  # 0: any free port
    processes: int = Field(default=1, ge=1, le=32)
    max_associations: int = Field(default=50, ge=1)
    max_per_sender: int = Field(default=20, ge=1)  # associations of one calling AE at a time
    max_per_minute: int = Field(default=600, ge=1)  # associations of one address and minute
    acse_timeout_s: float = Field(default=30.0, gt=0)  # ARTIM
    dimse_timeout_s: float = Field(default=60.0, gt=0)
    idle_timeout_s: float = Field(default=60.0, gt=0)
    max_pdu: int = Field(default=131072, ge=4096, le=1048576)  # bytes
    tls_port: int = Field(default=0, ge=0, le=65535)  # 0: off
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""  # set: client certificates are required
    allow_any_sender: bool = False  # tenants without senders accept anyone, also off loopback

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if self.tls_port and not (self.tls_cert and self.tls_key):
            raise ValueError("tls_port needs tls_cert and tls_key")
        return self


class InferenceSettings(_Part):
    models: tuple[str, ...] = ("ich",)  # folders under weights/, or paths
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    max_batch: int = Field(default=32, ge=1, le=1024)  # images
    engine: Literal["local"] = "local"  # "ray" is not in this version
    device_timeout_s: float = Field(default=300.0, gt=0)  # a longer call hangs: started anew
    loaders: int = Field(default=2, ge=1, le=64)  # decoding children
    loader_memory_mb: int = Field(default=4096, ge=256)
    loader_timeout_s: float = Field(default=120.0, gt=0)  # for one instance
    # Rows x Columns x Frames of one instance, and of all that are analysed together
    max_pixels: int = Field(default=2_000_000_000, ge=1)


class DashboardSettings(_Part):
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)  # 0: any free port
    allowed_hosts: tuple[str, ...] = ()  # besides host itself and localhost
    session_hours: float = Field(default=12.0, gt=0)
    metrics_token: SecretStr = SecretStr("")  # empty: /metrics from loopback only
    secure_cookies: bool = False  # set behind TLS
    max_upload_mb: int = Field(default=4096, ge=1)


class Settings(BaseSettings):
    """The whole configuration; every part is frozen, and unknown keys are refused."""

    model_config = SettingsConfigDict(
        env_prefix="VIGIL_", env_nested_delimiter="__", frozen=True, extra="forbid"
    )

    node: NodeSettings = NodeSettings()
    scp: ScpSettings = ScpSettings()
    inference: InferenceSettings = InferenceSettings()
    dashboard: DashboardSettings = DashboardSettings()
    tenants: tuple[Tenant, ...] = (Tenant(id="default", ae_titles=("VIGIL",)),)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The environment wins over the file, which arrives as init values.
        return env_settings, init_settings

    @model_validator(mode="after")
    def _tenants_agree(self) -> Self:
        owners: dict[str, str] = {}
        ids: set[str] = set()
        for tenant in self.tenants:
            if tenant.id in ids:
                raise ValueError(f"tenant id {tenant.id!r} is used twice")
            ids.add(tenant.id)
            for title in tenant.ae_titles:
                if title in owners:
                    raise ValueError(
                        f"AE title {title!r} belongs to both {owners[title]!r} and {tenant.id!r}"
                    )
                owners[title] = tenant.id
            if strange := set(tenant.models + tenant.shadow) - set(self.model_names):
                raise ValueError(
                    f"tenant {tenant.id!r} uses {sorted(strange)}, not among inference.models"
                )
            self._check_openness(tenant)
        return self

    def _check_openness(self, tenant: Tenant) -> None:
        if tenant.senders or self.scp.allow_any_sender or is_loopback(self.scp.host):
            return
        raise ValueError(
            f"tenant {tenant.id!r} lists no senders and would accept anyone on {self.scp.host}: "
            "list its senders, or set scp.allow_any_sender = true"
        )

    @property
    def model_names(self) -> tuple[str, ...]:
        """The bundles' names: the last part where a path is given."""
        return tuple(Path(model).name for model in self.inference.models)

    @cached_property
    def by_ae_title(self) -> dict[str, Tenant]:
        return {title: tenant for tenant in self.tenants for title in tenant.ae_titles}

    def tenant(self, tenant_id: str) -> Tenant | None:
        return next((tenant for tenant in self.tenants if tenant.id == tenant_id), None)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def config_path(given: Path | None = None) -> Path:
    """The file to read: as given, else $VIGIL_CONFIG, else config/vigil.toml."""
    return given or Path(os.environ.get("VIGIL_CONFIG") or DEFAULT_CONFIG)


def load(path: Path | None = None) -> Settings:
    """Read and check the configuration.

    The default file may be absent (an empty one works); a file that was named must exist.

    Raises
    ------
    SettingsError
        With file, line, key and reason; nothing of a secret's value.
    """
    named = path is not None or bool(os.environ.get("VIGIL_CONFIG"))
    path = config_path(path)
    text = _read(path) if named or path.exists() else ""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path}: {error}") from None
    try:
        return Settings(**values)
    except ValidationError as error:
        raise SettingsError(_explain(error, path, text)) from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: cannot be read ({type(error).__name__})") from None


def _explain(error: ValidationError, path: Path, text: str) -> str:
    lines = []
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    keys = [tuple(problem["loc"]) for problem in problems]
    for problem, key in zip(problems, keys, strict=True):
        # A list whose only item is wrong is also called empty: what is wrong is said of the item.
        is_inside = any(other[: len(key)] == key and other != key for other in keys)
        if problem["type"] == "too_short" and is_inside:
            continue
        dotted = ".".join(str(part) for part in key) or "configuration"
        line = line_of(text, key)
        place = f"{path}:{line}" if line else f"{path}"
        reason = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            reason = "unknown key"
        lines.append(f"{place}: {dotted}: {reason}")
    return "\n".join(lines)
