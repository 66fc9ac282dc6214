"""The model that is tuned: read, placed on its devices, called with packed rows, gathered and written.

A row holds several whole samples. Each sample keeps its own positions and attends only to itself, without
padding and without a mask; `attention` implements that and checks at the start that the model complies.

    pretrained    reads the model and its tokenizer, and refuses what cannot be trained or saved
    adapters      adds LoRA adapters, and merges them into the weights for OUT/model
    accelerator   the settings of `accelerate launch`: one process, DDP or FSDP2
    placed        the model on its devices with its optimizer; whole weights and moments for checkpoints
    batch         a row of samples as the tensors of one forward pass
    attention     attention within samples; the packing isolation check
    loss          weighted loss over the target tokens of a step

The only public entry for other packages is `placed.Placed`: the loop trains it, `evaluation` asks it,
`saving` writes it.
"""
