"""What a training records about itself, in OUT and elsewhere.

The controller on rank 0 passes each step, evaluation and end to `record.TrainingMetrics`, which writes

    metrics.jsonl       one line per step and evaluation, and one when a process of the training ends
    trained.jsonl       for each step the examples that it trained on, with their losses
    task_losses.json    how hard each task currently is; `seeds.task_losses` orders a run by it

and logs a summary. Modules in reading order:

    record      the three files, the log line and the verdict (generation-, reading- or training-bound)
    step_log    JSON lines by step, cut back to the checkpoint when a training resumes; imports no torch
    mfu         model FLOPs utilisation
    trackers    the same metrics in tensorboard, wandb and trackio; with `--from URL` also at the daemon
    plot        OUT/training.png, drawn from metrics.jsonl without torch
"""
