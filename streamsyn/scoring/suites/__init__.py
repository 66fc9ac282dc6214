"""Published suites of questions for a model: read from their own files, asked of servers, scored by their
rules. No data is packaged.

    suite_files        reads rows, and tells by their fields which suite they are of
    suite_question     a question of any suite; prompts from templates
    longbench_suite    LongBench, versions 1 and 2
    longbench_metrics  the metrics of version 1
    ruler_suite        RULER's 13 tasks
    recall_suite       the recall tasks of HELMET
    mrcr_suite         OpenAI MRCR
    graphwalks_suite   GraphWalks
    needle_suite       questions about numbers hidden in generated text, also for a training's own model
    suite_run          asks servers; scores with confidence intervals
"""
