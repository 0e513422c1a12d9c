"""Flow-matching samplers inside the blocks of a set-block model, next to its own decoders: specs and their names."""

# Samplers by what a token costs them; theta_trapezoidal takes two forwards a step.
FLOW_STEPS: dict[str, tuple[int, ...]] = {
    "exact": (2, 4, 8),
    "topk": (2, 4, 8),
    "theta_trapezoidal": (2, 4),
    "corrector": (4, 8),
    "remdm": (4, 8),
    "p2": (4, 8),
}
BOUNDS = (0.01, 0.1, 0.35, 1)


def block_specs(block_size: int = 8) -> dict[str, str]:
    """Decoder specs, each with the name of its curve."""
    specs = {"ntp": "next token"}
    specs |= {f"sbd:block_size={block_size},entropy_bound={bound}": "sbd, entropy bound" for bound in BOUNDS}
    anchored = "anchor=true,commit=prefix"
    specs |= {f"sbd:block_size={block_size},entropy_bound={bound},{anchored}": "sbd, anchored" for bound in BOUNDS}
    specs[f"sbd-lossless:block_size={block_size}"] = "sbd-lossless (self-speculation)"
    for sampler, counts in FLOW_STEPS.items():
        for steps in counts:
            specs[f"dfm:block_size={block_size},sampler={sampler},steps={steps}"] = f"dfm, {sampler}"
    specs[f"dfm:block_size={block_size},sampler=first_hitting"] = "dfm, first_hitting"
    return specs
