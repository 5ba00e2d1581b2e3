"""Where calibration data is read from: token windows for language models, images for classifiers.

catalogue.py      the names of the sources
sources.py        the sources themselves; start reading here
windows.py        what a run asks for, and what it gets; the beginning-of-sequence token
draw.py           random windows of documents or of one long text, or of several texts in turn
corpora.py        the named corpora: C4, WikiText-2, Penn Treebank, Python's documentation and code
files.py          text and token ids from the user's files
images.py         images from a folder
training_text.py  all windows of a source in order, for recovery

Knows nothing of blocks or pruning. Import from these files; this page exports nothing.
"""
