"""The report: one HTML page on a run directory, with a verdict on whether the run is fit for training.

The log is read once: rows -> metrics in bounded memory -> verdict -> page. The page is a single file that
loads nothing, and the same directory gives the same page. A run may be writing to the directory.

In reading order:

- `page`: writes the page, from the templates in `data/report`.
- `verdict`: the six facts that decide whether a run is fit for training, and their thresholds.
- `run_metrics`: all metrics of the page, collected in one pass over the log.
- `traffic`: tokens and failed attempts by server and model, and what happened when.
- `report_examples`: rejects, repeats and samples to read, drawn at random but always the same ones; long
  texts are cut in the middle, with the words of the answer marked.
- `charts`: distributions of values in bounded memory, and charts as inline SVG.
- `log_rows`: fields of a log row, which another version or a user's recipe may have written.
"""
