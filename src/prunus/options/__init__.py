"""Options, each declared once: the command line, files, keywords and checks follow from that.

declaration.py  what is known of an option, and the models that hold options
ranges.py       which values an option takes
signatures.py   options as the keywords of a Python function
toml.py         options as TOML
"""

from prunus.options.declaration import Option, Options
from prunus.options.ranges import Range, at_least, between, one_of
from prunus.options.signatures import takes

__all__ = ["Option", "Options", "Range", "at_least", "between", "one_of", "takes"]
