"""Files of a user that have the names of our packages: Python would take them for ours, and fail without saying why."""

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("decoding", "sbd", "rpt", "dfm", "steering", "finetune", "eval", "serving")


def check_shadows() -> None:
    """Raise ImportError, with the file to rename, if one of our packages would be imported from elsewhere than this one."""
    ours = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        found = find_spec(name)
        if found is not None and found.origin is not None and ours not in Path(found.origin).resolve().parents:
            raise ImportError(
                f"{found.origin} has the name of a package that setflow needs; rename it, or start Python in another folder"
            )
