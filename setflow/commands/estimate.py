"""``setflow estimate``: what decoding could reach on a machine that is not at hand, from bytes and arithmetic."""

import json
from typing import Annotated

import typer

from decoding.inputs.checks import check_range

app = typer.Typer(
    help="Compute what a machine could reach; nothing is measured.", no_args_is_help=True, rich_markup_mode=None
)


@app.callback()
def estimate() -> None:
    """Compute what a machine could reach; nothing is measured."""


@app.command()
def decode(
    shape: Annotated[str, typer.Option(help="As for setflow bench engine.")] = "llama-3.1-8b",
    device: Annotated[str | None, typer.Option(help="h100, h200 or b200, in bf16; or give the two figures.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Gigabytes per second read from memory.")] = None,
    teraflops: Annotated[float | None, typer.Option(help="Of dense products, in 10^12 per second.")] = None,
    batch_size: Annotated[list[int] | None, typer.Option(min=1, help="1, 4, 8, 16 and 32 by default.")] = None,
    context: Annotated[list[int] | None, typer.Option(min=1, help="1024 and 8192 by default.")] = None,
    block_size: Annotated[list[int] | None, typer.Option(min=2, help="4, 8 and 16 by default.")] = None,
    tokens_per_forward: Annotated[float, typer.Option(min=1.0, help="Recorded on texts of yours.")] = 3.0,
    weight_bits: Annotated[int, typer.Option(help="16, 8 or 4.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Tokens per second of next-token decoding and of each decoder, by a roofline: bounds, no measurements."""
    from decoding.inputs.checks import check_choice
    from eval.bench.roofline import DEVICES, DeviceFigures, ModelFigures, estimate_decoding
    from eval.bench.shapes import check_shape, find_shape
    from eval.tables import screen_table

    check_shape(shape)
    check_choice("weight_bits", weight_bits, (16, 8, 4))
    if (bandwidth is None) != (teraflops is None) or (device is not None) == (bandwidth is not None):
        raise ValueError("give either --device, or --bandwidth and --teraflops")
    if device is not None:
        check_choice("device", device, tuple(DEVICES))
        figures = DEVICES[device]
    else:
        assert bandwidth is not None and teraflops is not None
        check_range("bandwidth", bandwidth, 0, include_low=False)
        check_range("teraflops", teraflops, 0, include_low=False)
        figures = DeviceFigures(1e9 * bandwidth, 1e12 * teraflops)
    model = ModelFigures.from_config(find_shape(shape))
    rows = list(
        estimate_decoding(
            model,
            figures,
            batch_size or (1, 4, 8, 16, 32),
            context or (1024, 8192),
            block_size or (4, 8, 16),
            tokens_per_forward,
            weight_bits / 8,
        )
    )
    if as_json:
        print(json.dumps({"shape": shape, "computed": True, "rows": rows}))
        return
    from rich.console import Console

    Console(width=200).print(screen_table(rows))
