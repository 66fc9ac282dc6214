"""What a context is worth: checks of written contexts before they reach the log.

A worker passes each draft to the `Examiner`. It looks for text of evaluation sets, then for near-duplicates,
then asks a fleet of servers how much the context helps to find the gold answer. The findings become
`Context.checks` and its flags, or the draft is rejected with a reason.

    examiner         the order of the checks, thresholds, flags and rejects; opens index and fleet
    measures         context gain (likelihood of the gold answer) and answerability: questions, prompts,
                     requests to the scoring fleet, and results shared by drafts
    answer_metrics   F1 and ROUGE-L
    contamination    n-grams shared with evaluation sets
    score_log        `streamsyn score`: measures the contexts of a log
    sidecar          its findings, beside the log, and how readers get them
    duplicates       near-duplicates among the contexts so far (MinHash)

What a model is worth: `streamsyn evaluate` asks servers the questions of published suites (`suites/`).
"""
