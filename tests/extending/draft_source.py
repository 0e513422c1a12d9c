"""A draft source of one's own: number words follow each other, and so does whatever the text counts up."""

from sbd import Draft


class Counting:
    """Proposes that the text goes on counting: ids a, b with b - a = d are followed by b + d, b + 2 d, ..."""

    name = "counting"

    def propose(self, tokens: list[int], count: int) -> Draft:
        step = tokens[-1] - tokens[-2] if len(tokens) > 1 else 0
        drafts = [tokens[-1] + step * (i + 1) for i in range(count)]
        possible = [draft for draft in drafts if draft >= 3]
        return Draft(possible, [0.5] * len(possible), source=self.name)
