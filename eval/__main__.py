"""Evaluation from the command line.

    python -m eval --tasks additions,gsm8k --pretrained PATH --decoder sbd:block_size=16,entropy_bound=0.1 --output out

A run that was killed goes on if it is started again.
"""

from typing import Annotated

import typer


def main(
    tasks: Annotated[str, typer.Option(help="Names, separated by commas: lm-eval's, or those of eval/tasks/own.py")],
    pretrained: Annotated[str, typer.Option(help="Folder or hub name of the model")],
    decoder: Annotated[str, typer.Option(help="Spec of the decoder")] = "ntp",
    data: Annotated[str | None, typer.Option(help="Folder of local data sets, else SETFLOW_DATA, else the hub")] = None,
    output: Annotated[str | None, typer.Option(help="Folder for results; a killed run goes on from here")] = None,
    limit: Annotated[float | None, typer.Option(help="Samples of each task; a share if below 1")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt, if the task lets you choose")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at a time")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the weights")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, cpu, ...; by default what there is")] = None,
    apply_chat_template: Annotated[bool, typer.Option(help="Put prompts into the model's chat template")] = False,
    confirm_run_unsafe_code: Annotated[bool, typer.Option(help="Agree to run code that the model writes")] = False,
) -> None:
    """Evaluate a model with a decoder; prints scores and the costs of decoding."""
    from eval.run import evaluate

    evaluation = evaluate(
        tasks.split(","),
        {"pretrained": pretrained, "decoder": decoder, "batch_size": batch_size, "dtype": dtype, "device": device},
        data=data,
        output=output,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
    )
    print(evaluation.table())
    if evaluation.folder:
        print(f"written to {evaluation.folder}")


if __name__ == "__main__":
    typer.run(main)
