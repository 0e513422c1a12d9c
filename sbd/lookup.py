"""Drafts without a model: what followed the last few tokens when they occurred before."""


class PromptLookup:
    """Remembers where every short run of tokens of a text last occurred.

    Source: prompt lookup decoding, as in transformers' ``prompt_lookup_num_tokens``.
    """

    def __init__(self, longest: int = 3):
        self.longest = longest
        self._seen: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def draft(self, tokens: list[int], count: int) -> tuple[list[int], int]:
        """The ``count`` tokens that followed the longest known run that ends ``tokens``, and the length of that run.

        Where the text ends before there are so many it is taken to go round: what repeats itself goes on doing so.
        ``([], 0)`` if no run is known.
        """
        # A run that ends the text has no continuation yet, so only runs before the last token are indexed.
        for end in range(self._indexed + 1, len(tokens)):
            for length in range(1, min(self.longest, end) + 1):
                self._seen[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)
        for length in range(min(self.longest, len(tokens)), 0, -1):
            end = self._seen.get(tuple(tokens[-length:]))
            if end is not None:
                followed = tokens[end : end + count]
                return [followed[i % len(followed)] for i in range(count)], length
        return [], 0
