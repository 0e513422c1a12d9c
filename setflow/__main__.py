"""``python -m setflow`` is the command ``setflow``."""

import sys

from setflow.shadows import check_shadows


def main() -> int:
    """Run the command; 2 where a file in the working folder stands in its way."""
    try:
        check_shadows()
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from setflow.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
