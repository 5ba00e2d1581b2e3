"""Reports: the figures of runs, sweeps and evaluations as HTML, Markdown and terminal tables.

A report is a document of `prunus.runs.document`: facts, tables and charts without any formatting.

write.py                one call from folders and files to a page
sources.py              from folders and files to a document
quality.py              columns of quality, size and speed, and the charts of one against the other
evaluation_sections.py  files of `prunus eval --json` and `prunus bench --json`
sweep_section.py        one sweep; sweep_quality.py has its tables and charts of quality
run_sections.py         one pruning run
run_comparison.py       several runs compared
structure_section.py    one model that was made smaller
tables.py               tables of the other verbs
page.py                 a document as one HTML page; its charts are drawn by figures.py
plain.py                a document as Markdown, or as tables in the terminal
console.py              the terminal: no markup in names, no control characters
progress.py             progress of a run, on standard error

No module here imports torch when it is imported: a report is read and shown without it.
"""
