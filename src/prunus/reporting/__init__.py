"""Reports: the figures of runs, sweeps and evaluations as HTML, Markdown and terminal tables.

A report is a document of `prunus.engine.document`: facts, tables and charts without any formatting.

write.py                one call from folders and files to a page
evaluation_sections.py  files of `prunus eval --json`; charts of quality
sweep_section.py        one sweep
run_sections.py         one run of prune, compress or shrink
tables.py               tables of the other commands
page.py                 a document as Markdown, or as one HTML page with its charts
console.py              the terminal: a document as tables, and the progress of a run

No module here imports torch when it is imported: a report is read and shown without it.
"""
