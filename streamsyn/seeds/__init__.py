"""Seeds: where they come from, and how a line or a row becomes one.

    files, directories, globs -> io.row_reader -> parse -> entries, in batches -> the producer
    stdin -> the spool (OUT/spool/stdin.jsonl, on disk first) ----^

An entry is a `Seed`, or a `BadSeed` that becomes a reject with the place (`file:line`) and the reason.

Modules in reading order:
    reader   all sources of a run as one stream, in turn or interleaved by weight
    files    the seeds of one file or saved dataset
    stdin    the seeds of a pipe, and its spool
    parse    from a line or a row to an entry, by the field names of `seeds.fields`

Finding files and reading their rows is in `streamsyn.io`, which the trainer, the corpus of assembly and the
evaluation sets of scoring use too.
"""
