"""Seeds: where they come from, and how a line or a row becomes one.

    files, datasets -> io.inputs -> forms, parse -> entries, in batches -> the producer
    stdin -> the spool (OUT/spool/stdin.jsonl, on disk first) ----^
    submitted -> the inbox (OUT/spool/seeds.jsonl, on disk first) ^

An entry is a `Seed`, or a `BadSeed` that becomes a reject with the place (`file:line`) and the reason.

Modules in reading order:
    reader   all sources of a run as one stream, in turn or interleaved by weight; the seeds of a file
    id_owners  which pair each id belongs to
    stdin    the seeds of a pipe, and its spool
    inbox    the seeds that are submitted while a run goes on
    submission  one request that submits seeds, and its answer
    inbox_file  the file of an inbox: many requests, one sync; its index
    inbox_lines  the lines of that file
    parse    from a line or a row to an entry
    forms    the pair in a row: Alpaca, chats, questions and answers, and others; the texts in its fields
    request_lines  the lines of OpenAI's Batch API, for the recipe `chat`

Finding files and reading their rows is in `streamsyn.io`, which the trainer, the corpus of assembly and the
evaluation sets of scoring use too.
"""
