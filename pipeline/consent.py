"""What the user has agreed to: which clusters may be asked, and whose code may run.

A results folder can come from anybody, so what it says of itself is no consent. This stands outside of every results
folder, in the user's own configuration (`$XDG_CONFIG_HOME/layerwise/consent.json`, else below `~/.config`), and is
written when he names an address or a model himself: on the command line, or in a workflow that he runs. A record in a
results folder can only narrow it.

Left out: taking consent back. The file is small and plain; delete it, or a part of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import ClusterError, UsageError
from layerwise.pipeline.cluster.connection import ADDRESS_VARIABLES, same_address
from layerwise.results.durable import replace_file


class NotNamed(ClusterError):
    """A cluster that only a results folder names: it is sent nothing."""


@dataclass(frozen=True)
class Consent:
    """What may be sent to a cluster.

    Args:
        in_clear: whether the token may travel in clear.
        pass_env: names of the variables that may be handed on to jobs there.
    """

    in_clear: bool = False
    pass_env: frozenset[str] = frozenset()


def consent_file() -> Path:
    """Where it stands.

    Raises:
        UsageError: there is no home folder.
    """
    configured = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    try:
        folder = configured if configured.is_absolute() else Path.home() / ".config"
    except RuntimeError as error:
        raise UsageError("no home folder, so no place for your settings", hint="set HOME or XDG_CONFIG_HOME") from error
    return folder / "layerwise" / "consent.json"


def consent_to(address: str) -> Consent:
    """What the user has agreed to send to a cluster; one that a variable of his environment names may be asked.

    Raises:
        NotNamed: he has never named it.
    """
    record = _section("clusters").get(_key(address))
    if isinstance(record, dict):
        names = record.get("pass_env")
        return Consent(
            record.get("in_clear") is True, frozenset(map(str, names)) if isinstance(names, list) else frozenset()
        )
    if any(same_address(os.environ[name], address) for name in ADDRESS_VARIABLES if os.environ.get(name)):
        return Consent()
    raise NotNamed(
        f"the results folder names the cluster {address}, and you have not; nothing was sent there",
        hint=f"if it is one of yours, say so: --address {address}",
    )


def name_cluster(address: str, *, in_clear: bool = False, pass_env: Iterable[str] = ()) -> None:
    """Keep that the user named a cluster; what he agreed to before stays.

    Args:
        address: of the dashboard, plain.
        in_clear: whether he lets the token travel there in clear.
        pass_env: names of the variables that he lets go there.
    Raises:
        UsageError: it cannot be kept.
    """
    try:
        before = consent_to(address)
    except NotNamed:
        before = Consent()
    clusters = _section("clusters")
    record = {
        "in_clear": in_clear or before.in_clear,
        "pass_env": sorted({*pass_env, *before.pass_env}),
    }
    if clusters.get(_key(address)) != record:
        _write("clusters", {**clusters, _key(address): record})


def trusts_model(model: str) -> bool:
    """Whether the user has named a model as one whose code may run.

    Args:
        model: its folder, absolute, or its id.
    """
    return model in _section("models")


def name_model(model: str) -> None:
    """Keep that he did.

    Raises:
        UsageError: it cannot be kept.
    """
    if not trusts_model(model):
        _write("models", {**_section("models"), model: True})


def _key(address: str) -> str:
    return address.rstrip("/").lower()


def _section(name: str) -> dict[str, Any]:
    section = _read().get(name)
    return section if isinstance(section, dict) else {}


def _read() -> dict[str, Any]:
    """The file; what cannot be read is no consent."""
    try:
        document = json.loads(consent_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _write(name: str, section: dict[str, Any]) -> None:
    path = consent_file()
    text = json.dumps({**_read(), name: section}, indent=1, sort_keys=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, text.encode(), path.parent / "tmp")
    except OSError as error:
        raise UsageError(
            f"cannot keep in {path} what you agree to: {error.strerror or error}",
            hint="name a folder of yours by XDG_CONFIG_HOME",
        ) from error
