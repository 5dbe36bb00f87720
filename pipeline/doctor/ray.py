"""Ray on this machine: its token, the variables that lead it elsewhere, its sockets."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
from pathlib import Path

from layerwise.pipeline.cluster.connection import ADDRESS_VARIABLES, same_address
from layerwise.pipeline.cluster.tokens import asks_for_token, find_token, token_file
from layerwise.pipeline.doctor.check import Finding, Surroundings, ok, problem, warning

_RAYS_SOCKET = "/session_2000-01-01_00-00-00_000000_1234567/sockets/plasma_store"
"""The longest that Ray 2.60 appends to its folder; the kernel takes 107 bytes in all."""


def authentication(_: Surroundings) -> Finding:
    """Whether a Ray of ours asks for a token."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if asks_for_token():
        return ok("by token, as RAY_AUTH_MODE says" if mode else "by token, which layerwise asks Ray for")
    return warning(
        f"RAY_AUTH_MODE={mode}: a local Ray lets in whoever reaches its ports, and no token is sent to a cluster",
        "unset RAY_AUTH_MODE",
    )


def token(_: Surroundings) -> Finding:
    """Where the token comes from, and who can read it."""
    found = find_token()
    if found is None:
        return ok(f"none yet; Ray makes one in {token_file()} when it first starts")
    mode = found.open_mode
    if mode is not None:
        return warning(
            f"from {found.source}, which is open to others (mode {mode:o})", f"chmod 600 {shlex.quote(str(found.file))}"
        )
    return ok(f"from {found.source}")


def addresses(surroundings: Surroundings) -> Finding:
    """Variables that Ray's job client follows instead of the address that it is given; the first one wins."""
    given = {name: os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)}
    if not given:
        return ok(f"{ADDRESS_VARIABLES[0]} and {ADDRESS_VARIABLES[1]} are not set")
    shown = ", ".join(f"{name}={re.sub('//[^/]*@', '//***@', value)}" for name, value in given.items())
    address = surroundings.address
    if address is None:
        return ok(f"{shown}; a Ray that layerwise starts here is not touched by that")
    first = next(iter(given.values()))
    if same_address(first, address):
        return ok(f"{shown}, the same as --address")
    return problem(f"Ray's job client would follow {shown} instead of --address {address}", f"unset {' '.join(given)}")


def sockets(_: Surroundings) -> Finding:
    """Whether a socket with a path as long as Ray's can be made where Ray's would be."""
    from layerwise.pipeline.executors.ray_session import RAYS_FOLDER, private_folder

    folder = private_folder()
    path = f"{folder / RAYS_FOLDER}{_RAYS_SOCKET}"
    try:
        Path(path).parent.mkdir(parents=True)
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(path)
    except OSError as error:
        return problem(
            f"Ray's sockets do not work in {folder.parent} ({len(os.fsencode(path))} bytes long): {error}",
            "set TMPDIR to a short path on a local disk",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return ok(f"paths of {len(os.fsencode(path))} of at most 107 bytes in {folder.parent}")
