"""Reports: the figures of runs, sweeps and evaluations as pages, tables and plots.

A report is a document of `prunus.document`: facts, tables and charts without any formatting.

write.py                one call from folders and files to a page
evaluation_sections.py  files of `prunus eval --json`; charts of quality
sweep_section.py        one sweep
run_sections.py         one run of prune, compress or shrink; several beside each other
tables.py               tables of the other commands
page.py                 a document as Markdown, or as one HTML page with its charts
paper.py                a document as LaTeX, or its figures as CSV
figure.py               the charts of a document as SVG, PNG or PDF
console.py              the terminal: a document as tables, and the progress of a run

No module here imports torch when it is imported: a report is read and shown without it.
"""
