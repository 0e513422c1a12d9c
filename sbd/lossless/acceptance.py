"""Running estimates of how far drafts are accepted, for choosing which acceptance lengths to provide for."""

from collections.abc import Sequence

BINS = 8  # of a draft's confidence
PRIOR = 2.0  # weight, in observations, of the guess that a draft is accepted with its confidence
UNKNOWN = 0.5  # the guess where the confidence is not known
KEPT = 0.97  # of the weight of earlier observations with each new one, so that about the last 30 count


class AcceptanceTable:
    """P(draft j is accepted | all before it were), by offset and by its confidence.

    Starts from the guess that the confidence says it: for a mask row, that the model is calibrated.
    """

    def __init__(self, max_drafts: int):
        self.accepted = [[0.0] * BINS for _ in range(max_drafts)]
        self.tried = [[0.0] * BINS for _ in range(max_drafts)]

    def record(self, confidences: Sequence[float], accepted: int) -> None:
        """Count one verified draft: its first ``accepted`` tokens were accepted, the next one, if any, was not."""
        for offset, confidence in enumerate(confidences[: accepted + 1]):
            bin_ = _bin(confidence)
            self.tried[offset][bin_] = KEPT * self.tried[offset][bin_] + 1
            self.accepted[offset][bin_] = KEPT * self.accepted[offset][bin_] + (offset < accepted)

    def rates(self, confidences: Sequence[float], count: int | None = None) -> list[float]:
        """Estimated acceptance of each of ``count`` drafts, given the ones before it; by default of those in ``confidences``.

        Where the confidence is not known the mean over all drafts of that offset stands in for it.
        """
        estimates = []
        for offset, confidence in enumerate(confidences):
            bin_ = _bin(confidence)
            tried, accepted = self.tried[offset][bin_], self.accepted[offset][bin_]
            estimates.append((accepted + PRIOR * confidence) / (tried + PRIOR))
        for offset in range(len(confidences), count or 0):
            tried, accepted = sum(self.tried[offset]), sum(self.accepted[offset])
            estimates.append((accepted + PRIOR * UNKNOWN) / (tried + PRIOR))
        return estimates

    def lengths(self, confidences: Sequence[float], count: int | None = None) -> list[float]:
        """P(acceptance length = a) for a = 0 .. number of drafts, which is as in :meth:`rates`."""
        reached, lengths = 1.0, []
        for rate in self.rates(confidences, count):
            lengths.append(reached * (1 - rate))
            reached *= rate
        return [*lengths, reached]


def _bin(confidence: float) -> int:
    return min(BINS - 1, int(confidence * BINS))
