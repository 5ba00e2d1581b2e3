"""Where calibration data is read from: token windows for language models, images for classifiers.

catalogue.py      the names of the sources
sources.py        the sources themselves; start reading here
windows.py        what a run asks for, and what it gets
bos.py            the beginning-of-sequence token of windows
draw.py           random windows of documents or of one long text
corpora.py        the named corpora: C4, WikiText-2, Penn Treebank, Python's documentation
files.py          text and token ids from the user's files
texts.py          lists of texts, data sets and chats that a program gives
generate.py       text that the model writes itself
images.py         images from a folder
training_text.py  all windows of a source in order, for recovery
hub.py            data sets of the Hugging Face hub

Knows nothing of blocks or pruning. Import from these files; this page exports nothing.
"""
