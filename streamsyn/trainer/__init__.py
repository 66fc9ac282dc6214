"""Online instruction tuning: samples become a tuned model while they are written.

    sources -> stream_reader -> planner -> controller -> loop (every rank) -> OUT/checkpoints, OUT/model

Modules in reading order:
    training_request  what to train on what, and every check that does not need torch
    training          one training from start to end; every rank runs `train`
    examples          what flows: rows, Example, StepPlan
    sources/          rows: of a run directory, of stdin, of files
    stream/           rows -> tokens -> the rows of each step, exactly resumable
    commands          what rank 0 sends to all ranks, and the channel
    controller        decides on rank 0 when to train, evaluate, save, publish and stop
    loop              carries out the commands on every rank, at the learning rate of its schedule
    dry_step          a pass over the largest row before the first step: is there enough memory?
    memory_plan       the same without a GPU: what a training will need, and the table of `train --plan`
    gathering         what FSDP2 has in memory during a pass besides its shards
    model/            the model on its devices: attention of packed rows, loss, adapters
    evaluation/       held-out losses, needles, LongBench
    metrics/          metrics.jsonl and what else is recorded
    saving/           checkpoints, the result, weights for servers
    outdir            OUT: its lock and train.json
    signals           how a training is told to stop
    supervisor        `run --train`: the trainer process beside a run
    on_cluster        `train --ray`: the ranks on a Ray cluster, started again when some are lost
    sample_dataset    samples as a torch dataset, for trainers that are not ours
    sample_position   keeps its position in the checkpoints of Hugging Face's Trainer

This is the only package that imports torch. README.md explains packing, resuming, several GPUs, evaluation
and feedback.
"""
