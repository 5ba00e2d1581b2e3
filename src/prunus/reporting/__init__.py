"""Reports: the figures of runs, sweeps and evaluations as HTML, Markdown and terminal tables.

document.py             a report as sections of facts, tables and charts, without any formatting
write.py                one call from folders and files to a page
sources.py              from folders and files to a document
run_sections.py         one pruning run
run_comparison.py       several runs side by side
sweep_tables.py         one sweep; its quality tables and chart stand in sweep_quality.py
size_charts.py          quality against size and speed
evaluation_sections.py  files of `prunus eval --json` and `prunus bench --json`
page.py                 a document as one HTML page; its charts are drawn by figures.py
plain.py                a document as Markdown, or as tables in the terminal
tables.py               terminal tables of the verbs
evaluation_tables.py    terminal tables of `prunus eval`
recovery_tables.py      terminal table of `prunus recover`
console.py              the terminal: no markup in names, no control characters
progress.py             progress of a run, on standard error

No module here imports torch when it is imported: a report is read and shown without it.
"""
