"""Options, each declared once: the command line, files, keywords and checks follow from that."""

from prunus.options.declaration import Option, Options, Range, at_least, between, one_of, takes

__all__ = ["Option", "Options", "Range", "at_least", "between", "one_of", "takes"]
