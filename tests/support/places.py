"""Where things are: the repository, and the scripts that tests start as processes of their own."""

from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
REPOSITORY = SUPPORT.parent.parent
