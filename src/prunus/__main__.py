"""`python -m prunus` is the `prunus` command."""

from prunus.cli import main

main()
