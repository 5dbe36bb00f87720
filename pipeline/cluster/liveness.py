"""Whether an attempt at a run is alive: what the tables, its process and Ray say, put together.

The tables are the truth: an attempt that has written its end has ended like that, whatever Ray says. Of one that has
not, the process is asked, if it is on this host. Ray is asked only where that gives no answer, and by those who want
to know everything about one run also beside it, because a disagreement is worth telling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from layerwise.errors import ClusterError
from layerwise.pipeline.cluster.jobs import Job, Jobs
from layerwise.pipeline.cluster.submission import Submission
from layerwise.pipeline.runs.attempt import Attempt


@dataclass(frozen=True)
class Verdict:
    """What is known of an attempt.

    Args:
        status: in the words of `status.RunState`.
        checked: False where it has not ended as far as is known, and nobody could be asked.
        remark: what Ray says that the status does not.
        error: why a job ended before its attempt began.
        failure: why Ray could not be asked, where only Ray can say.
    """

    status: str
    checked: bool = True
    remark: str | None = None
    error: str | None = None
    failure: ClusterError | None = None


class Clusters:
    """The clusters that are asked, each visited once; one that does not answer is not tried again."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, bool], Jobs | ClusterError] = {}

    def ask(self, submission: Submission) -> Job | None:
        """What Ray says of the job, None if it knows none.

        Raises:
            ClusterError: it cannot be asked.
        """
        return self.jobs(submission).find(submission.job)

    def jobs(self, submission: Submission) -> Jobs:
        """The jobs of the cluster that it went to.

        Raises:
            ClusterError: it cannot be asked.
        """
        place = submission.address, submission.in_clear
        if place not in self._known:
            try:
                self._known[place] = Jobs.recorded(submission.address, in_clear=submission.in_clear)
            except ClusterError as error:
                self._known[place] = error
        known = self._known[place]
        if isinstance(known, ClusterError):
            raise known
        return known

    def forget(self) -> None:
        """Try all of them again."""
        self._known.clear()


def judge(
    recorded: str | None,
    attempt: Attempt | None,
    submission: Submission | None,
    clusters: Clusters,
    *,
    over: bool = False,
    thorough: bool = False,
) -> Verdict:
    """How an attempt stands.

    Args:
        recorded: the last status that it wrote, None if it wrote none.
        attempt: its record, None if there is none.
        submission: that of its submission, None if it was started otherwise.
        clusters: to ask.
        over: whether a later attempt was made, so that this one cannot be at work.
        thorough: whether to ask Ray also where the process has been asked.
    """
    if recorded not in (None, "running"):
        return Verdict(str(recorded))
    begun = recorded is not None or attempt is not None
    if over or not (begun or submission is not None):
        return Verdict("interrupted" if over else "not started")
    alive = None if attempt is None else attempt.process.alive()
    known = Verdict(_at_work(alive) if begun else "pending", checked=alive is not None)
    if submission is None or (alive is not None and not thorough):
        return known
    try:
        job = clusters.ask(submission)
    except ClusterError as error:
        return known if known.checked else replace(known, remark=error.message, failure=error)
    if not begun:
        return _not_begun(submission, job, clusters)
    return _by_ray(submission, job) if alive is None else _beside_ray(submission, alive, job)


def _at_work(alive: bool | None) -> str:
    return "interrupted" if alive is False else "running"


def _not_begun(submission: Submission, job: Job | None, clusters: Clusters) -> Verdict:
    if job is None:
        return Verdict("interrupted", remark=_unknown(submission))
    if not job.over:
        return Verdict("pending")
    if job.status == "STOPPED":
        return Verdict("stopped", remark=f"job {submission.job} was stopped before it began")
    return Verdict("failed", error=refusal(clusters.jobs(submission).log(submission.job)) or job.message)


def _by_ray(submission: Submission, job: Job | None) -> Verdict:
    """Its process cannot be asked, so Ray's word stands for it."""
    if job is None:
        return Verdict("interrupted", remark=_unknown(submission))
    if not job.over:
        return Verdict("running")
    return Verdict("interrupted", remark=f"Ray says {job.status} of job {submission.job}, which has not said so itself")


def _beside_ray(submission: Submission, alive: bool, job: Job | None) -> Verdict:
    status = _at_work(alive)
    if job is None:
        return Verdict(status, remark=_unknown(submission))
    if alive == job.over:
        found = "at work" if alive else "gone"
        return Verdict(status, remark=f"Ray says {job.status} of job {submission.job}, but its process is {found}")
    return Verdict(status)


def _unknown(submission: Submission) -> str:
    return f"the cluster at {submission.address} knows no job {submission.job}: it may have been started anew"


def refusal(log: str) -> str:
    """The error that a job ended with, as it printed it, without the hint's and Ray's own lines around it."""
    start = log.rfind("error: ")
    return log[start:].removeprefix("error: ").strip() if start >= 0 else ""
