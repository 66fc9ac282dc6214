"""Evaluations while training: losses on samples that are not trained on, and questions for the model.

Rank 0 plans an evaluation and deals rows and prompts to all ranks as `Evaluate` commands. Each rank computes
losses and answers; rank 0 turns them into a line of metrics.jsonl and a file in OUT/answers.

    evaluations   when what is due, the commands, and the metrics from the results
    heldout       held-out samples with and without contexts, and control data: rows, losses, chained changes
    eval_servers  the same questions, asked of servers that load the published weights
    exam          questions, greedy decoding on all ranks, grading, metrics and OUT/answers
    longbench     questions from files in LongBench's format
"""
