"""Where the trainer's rows come from. Every source numbers its rows from 0 and can read them again.

Modules in reading order:
    source       the protocol `Source`; `Sources` is the stream and what is mixed into it
    locate       from `--from` and `train.mix` to sources; which paths must not overlap with OUT
    run_samples  the samples of a run, live or finished: of its directory, or at a daemon over HTTP
    pipe         NDJSON on stdin, spooled to OUT/spool before it is used
    row_files    JSON lines, Parquet, saved data sets, exports: files that do not change
"""
