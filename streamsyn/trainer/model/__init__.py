"""The model that is tuned: read, placed on its devices, called with packed rows.

A row holds several whole samples. Each sample keeps its own positions and attends only to itself, without
padding and without a mask; `attention` implements that, and `isolation` checks at the start that the model
complies. For a model that does not, a row holds one sample.

    pretrained    reads the model and its tokenizer, refuses what cannot be trained or saved, adds LoRA
                  adapters and merges them into the weights for OUT/model
    slices        reads of a model that is sharded only what each rank will hold
    placed        the model on its devices (one process, DDP or FSDP2, as `accelerate launch` sets it) with
                  its optimizer; its tensors by name, for what is saved of it
    attention     attention within samples
    isolation     the packing isolation check, which decides between packed rows and one sample a row
    loss          a row of samples as tensors; weighted loss over the target tokens of a step

The only public entry for other packages is `placed.Placed`: the loop trains it, `evaluation` asks it,
`saving` writes it.
"""
