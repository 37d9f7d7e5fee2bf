"""Whether data may be read: globs and walks pass over what they may not enter, as if nothing were there.

Imports no torch.
"""

import glob
import os


def denied(path: str) -> str | None:
    """What of a local file, folder or glob may not be read; None where all is well, or nothing is there."""
    place = os.path.expanduser(path)
    while glob.has_magic(place) and not os.path.exists(place):
        place = os.path.dirname(place) or "."
    try:
        if os.path.isfile(place):
            return None if os.access(place, os.R_OK) else place
        with os.scandir(place):
            return None
    except PermissionError:
        return place
    except OSError:
        return None
