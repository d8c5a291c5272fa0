"""The resource model against what others published: rows, the rule that fills what they leave unstated, and errors.

`python -m analysis.validate published --rows FILE.csv [--json]` works on any file with the columns of `rows.csv`, which
ships the public rows that the project knows, each with its source.

    rows.py     a row as printed, and the rows of one run together
    metrics.py  what a metric means and its value in SI units
    names.py    which accelerator, cluster, model family and framework a row's words name
    facts.py    the ModelSpec behind a row
    fill.py     the one written rule that fills what a run leaves unstated
    request.py  the question put to the predictor, and its answer
    flops.py    FLOPs per token in the convention of the row
    repeats.py  runs that a document prints twice
    judge.py    predicted against measured, row by row
    score.py    statistics over rows: errors, trivial baseline, ranking, OOM
    score.py    statistics over rows: errors, trivial baseline, ranking, out of memory
    report.py   the document and its tables
    predict.py  the Predictor: the resource model asked for a Request
    command.py  the command
"""
