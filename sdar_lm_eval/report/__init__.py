"""What a run tells its user beside the harness's own tables, and what the commands tell of finished runs.

During a run:

    live.py, run.py            accuracy so far; the progress bar of a round of requests
    counts.py                  tokens, forwards and times of an evaluation
    trace.py, denoising.py     files beside the samples: the trace; denoising records

Of finished runs, from files to texts:

    fields.py                  JSON objects whose values are checked when they are read: `Fields`
    results.py, samples.py     a results file; a line of its samples files: `Results`, `Sample`
    runs.py                    the results files of one model and its settings: `Run`, `Metric`
    documents.py               a run's documents, each with answers and scores: `Document`, `Answer`
    pairing.py, groups.py      the documents that two runs share; the documents of a group of tasks
    statistics.py              tests, intervals and standard errors
    compare.py                 the differences between two runs: `Comparison`, `Difference`
    changed.py                 the documents whose scores differ between two runs
    compare_text.py            comparisons as text, Markdown, CSV and JSON
    speed.py, points.py        a run's speed; its accuracy and speed as a point: `Point`, `Curve`
    aup.py                     the accuracy under parallelism of a curve, with its interval
    curve.py, by_task.py       accuracy against speed: table and chart of a task; a table of several tasks
    columns.py, published.py   the columns and rows of published tables
    table.py                   scores beside published ones
    several.py                 the names of metrics of several answers
    frames.py                  runs and comparisons as pandas data frames
    gsm8k_json.py              a GSM8K run as one JSON file
    page/                      runs as one HTML page
    machine.py                 versions, devices and engines of this machine
    streaming.py, terminal.py  an answer while it is denoised; a denoised answer with colours
    text_table.py, printing.py tables as text; texts that a terminal can print safely
"""
