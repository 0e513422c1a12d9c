"""What steering by a reward is worth, and what it costs."""
