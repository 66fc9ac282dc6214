"""From rows to the rows of each optimizer step. Runs on rank 0, in a thread beside the training.

    Source.fetch -> Renderer -> StreamReader -> Packer -> StepPlan -> PlanQueue

Modules in reading order:
    render          a row of messages as tokens, with the model's chat template
    spelled_tokens  special tokens that messages spell out stay text
    shortening      leaves distractors out of samples that are too long
    stream_reader   reads the stream and what is mixed into it, ahead of the training, in a fixed order
    packing         what is held; the examples of a step, packed into rows; balance between ranks
    planner         what each step trains on, with the state to resume after it; the queue of plans

The state of a plan holds positions and keys, never text: what was held is read again from its source.
"""
