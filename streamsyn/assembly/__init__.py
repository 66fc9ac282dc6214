"""Assembly: contexts of the log in, chat samples out; see README.md in this folder.

As a stage of a run it is in `pipeline/delivery.py`.

In reading order:

- `assembler`: one sample for each context, as a pure function of the log, the configuration and `run.seed`.
- `resources`: the prompts, tokenizer and corpus of a configuration, loaded once.
- `window`: the recent contexts that distractors are drawn from, and the contexts that wait for distractors.
- `distractors`: which candidates become distractors, and when a sample has enough.
- `corpus`: passages of other documents as distractors.
- `sample_prompts`: the user message, by the template of the task.
- `token_counter`: the length of a sample; exact with a tokenizer, and cheap, as each passage is encoded once.
- `pre_tokenizer`: where the encoding of a text can be split safely.
- `chat_tokenizer`: the tokenizer and chat template of the model to be tuned.
"""
