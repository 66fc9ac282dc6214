"""The flow of a run, from seeds to outcomes in the log and samples at the reader.

    seeds -> producer -> [work] -> workers -> [results] -> sink -> [durable] -> assembly -> samples

Modules in reading order:
    request     what is to be run (`RunRequest`)
    run         the flow on one page: check, open, set up the stages, run them, seal the log, deliver
    setup       opens the servers, and makes the workers and the assembly stage
    preflight   a sample of the seeds and one request are checked before a new run takes its first seed
    stages      the stages and the bounded queues between them; decides whether a stop leaves work
    stop        signals, a fleet that is gone, a training that ends: drain first, then cancel
    producer    reads seeds, skips what has an outcome, feeds the work queue in an order of its own
    reopened    rejects that a retry asks again: what it may change, where their seeds come from
    workers     each turns one draft at a time into an outcome; the pool keeps them running
    reject_limits  the first rejects are held back; too many of them stop the run
    delivery    the last stage: makes samples of durable contexts, gives them to the reader, then to the log
    stdout      stdout as a stream of samples; a stderr that cannot fail
    progress    the live table, or a log line every 10 s
    prometheus  the same numbers as metrics for Prometheus
    otlp        traces for an OpenTelemetry collector
    summary     the summary of what was done (`RunSummary`), as text and as JSON

With partitions, `coordinators` runs one process of this flow for each of them, a `coordinator_process`
here or an actor of `streamsyn.cluster`.

Beside the flow: `preview` renders requests without sending them and estimates what a run would take,
`status` shows what one is doing, and `verify` checks a run directory; `verify_joined` all
partitions of one. `merge` makes one run of several.
"""
