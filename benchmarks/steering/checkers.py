"""Rewards for worked additions: is the answer right, is every finished line right so far. WRONG is finite, so that some
particle always has weight.
"""

from eval.additions import Addition

WRONG = -20.0


def problem_of(prompt: str) -> Addition:
    """The addition that ``prompt`` asks for.

    >>> problem_of("47 + 5 = ?").b
    5
    """
    a, _, b, *_ = prompt.split()
    return Addition(int(a), int(b))


def right_answer(prompts: list[str], completions: list[str]) -> list[float]:
    """0 where the last line states the right sum; judges finished texts."""
    pairs = zip(prompts, completions, strict=True)
    return [0.0 if problem_of(prompt).is_answered_by(text) else WRONG for prompt, text in pairs]


def right_lines(prompts: list[str], completions: list[str], finished: list[bool]) -> list[float]:
    """0 while every line that has ended is that of the worked solution; judges texts on the way, too."""
    rewards = []
    for prompt, text, is_whole in zip(prompts, completions, finished, strict=True):
        solution = problem_of(prompt).solution
        known = text if is_whole else text[: text.rfind("\n") + 1]
        right = known == solution if is_whole else solution.startswith(known)
        rewards.append(0.0 if right else WRONG)
    return rewards
