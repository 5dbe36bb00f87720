"""A cluster: whom it lets in, and whether its Ray is ours."""

from __future__ import annotations

from layerwise.errors import ClusterError
from layerwise.pipeline.doctor.check import Finding, Surroundings, ok, problem, warning
from layerwise.pipeline.doctor.versions import FAULT_OF_OLD_RAY, OLDEST_RAY, installed_version, release


def door(surroundings: Surroundings) -> Finding:
    """Whether the cluster answers, and whom it lets in."""
    address, visit = surroundings.address, surroundings.cluster
    if isinstance(visit, ClusterError):
        return problem(visit.message, visit.hint)
    if visit.token is None:
        found = f"{address} lets anyone in: whoever can reach it runs code there"
        return warning(found, "start it with RAY_AUTH_MODE=token on every machine")
    return ok(f"{address} takes the token from {visit.token.source}")


def ray(surroundings: Surroundings) -> Finding:
    """The cluster's version of Ray, against ours."""
    visit, ours = surroundings.cluster, installed_version("ray")
    theirs = None if isinstance(visit, ClusterError) else visit.ray_version
    if theirs is None:
        return warning("version not known, for the cluster did not say", "see cluster")
    if release(theirs) < OLDEST_RAY:
        return problem(f"{theirs} {FAULT_OF_OLD_RAY}", "upgrade the cluster to Ray 2.59 or later")
    if ours is not None and release(theirs)[:2] != release(ours)[:2]:
        return warning(f"{theirs}, here it is {ours}", f"pip install 'ray=={theirs}'")
    return ok(theirs)
