"""The format of prunus itself: integers in an entropy code; see `prunus.runtime`."""
