"""The durable log of a run: each outcome is written once, and survives a kill or a loss of power.

    outcomes -> writer -> log -> shards on disk, manifest.jsonl -> mirror
                  |
                  contexts, once they are synced -> assembly

Modules in reading order:
    rundir          the run directory: folders, lock, run.json with configuration and fingerprint
    epoch           which of several processes may write to it
    writer          the sink stage: writes outcomes as they arrive, syncs, passes contexts on
    log             the log of a run: numbers rows, fills and seals shards, resumes after a kill
    shards          the bytes of one shard: append, sync, seal; reading up to a torn tail
    manifest        manifest.jsonl: one line for each sealed shard; removed.json beside it
    completed_keys  the index of drafts with an outcome, so that a resume asks for nothing twice
    journal         finished steps of unfinished drafts
    snapshot        the directory at one moment, for readers beside a run that writes; which rejects hold
    partitions      partitions.json: several run directories as one, in one order
    mirror          copies sealed shards to a URL, in a thread
    mirror_plan     what the mirror copies, in which order
    mirror_epoch    of several runs with one mirror, only the newest one counts
    mirror_target   the files of the mirror
    mirror_restore  an empty directory goes on with the run of its mirror

Files, guarantees and what a resume does: README.md in this folder. `pipeline.verify` checks all of it.
"""
