"""The model that is tuned: read, placed on its devices, called with packed rows, gathered and written.

A row holds several whole samples. Each sample keeps its own positions and attends only to itself, without
padding and without a mask; `attention` implements that and checks at the start that the model complies.

    pretrained    reads the model and its tokenizer, refuses what cannot be trained or saved, adds LoRA
                  adapters and merges them into the weights for OUT/model
    placed        the model on its devices (one process, DDP or FSDP2, as `accelerate launch` sets it) with
                  its optimizer; whole weights and moments for checkpoints
    attention     attention within samples; the packing isolation check
    loss          a row of samples as tensors; weighted loss over the target tokens of a step

The only public entry for other packages is `placed.Placed`: the loop trains it, `evaluation` asks it,
`saving` writes it.
"""
