"""The forward pass through a stock model: rows with two intervals of keys, slots, attention and what adapters are told."""
