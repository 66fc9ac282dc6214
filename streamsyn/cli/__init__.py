"""The command line: one module per command.

    main      the command group; turns errors into one line and an exit code
    exits     the exit codes, and how a command ends with one
    options   the options of `run`, which `preview` shares, and the configuration that they give
    partitioned_run   `run --partitions`: one process for each partition
    run, preview, train, demo         write contexts and samples; tune a model on them
    serve                             the daemon: many runs over one fleet
    deploy                            submit a Slurm job: servers, and a run that asks them
    submit                            a run on a Ray cluster, which survives its node
    retry, score                      ask rejects again; measure contexts beside the log
    export, report, verify, status    read a run directory
    merge                             makes one of several
    bench, evaluate                   measure the throughput of a fleet on this workload, and its model
    init, config, simulate            write or print a configuration; serve the simulator

Commands import what they need when they run, so that `streamsyn --help` takes 0.1 s. Results go to stdout;
logs, progress and errors go to stderr.
"""
