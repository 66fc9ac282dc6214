"""What a training writes of its weights.

Modules in reading order:
    checkpoint  OUT/checkpoints: folders that exist whole or not at all; imports no torch
    sharded     weights and optimizer into a checkpoint and back: each rank its part, beside the training
    result      the tuned model as a Hugging Face directory, gathered layer by layer
    store       when what is saved: one checkpoint at a time, and OUT/model at the end
    publish     OUT/weights, and the servers that load them while the training goes on
"""
