"""streamsyn as a library: `open_run` and `run_sync`, which the command line is built on too.

    arguments -> RunRequest -> pipeline -> the log -> rows, as they are written -> whoever iterates
    (arguments.py)  (run_thread.py)            (written_rows.py)  (open_run.py)

The pipeline runs in a thread with an event loop of its own, so that code which blocks the loop of the caller
delays no request. Samples are read back from the log: what is handed out is durable. Seeds that come from an
iterable go the other way, through `seed_feed.py` into the run's inbox, where they are on disk before the
pipeline sees them. `ReadAhead` in `written_rows.py` is the backpressure.
"""
