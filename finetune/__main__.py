"""``python -m finetune RECIPE.yaml key=value ...``: the form that torchrun and accelerate launch."""

import sys

from finetune.recipe_file import read_recipe


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m finetune RECIPE.yaml [key=value ...]")
        return 0 if arguments else 2
    try:
        read_recipe(arguments[0], arguments[1:])  # mistyped keys are answered before torch is imported
        from finetune import finetune, load_recipe

        finetune(load_recipe(arguments[0], arguments[1:]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
