"""`python -m prunus` is the `prunus` command."""

from prunus.cli.program import main

main()
