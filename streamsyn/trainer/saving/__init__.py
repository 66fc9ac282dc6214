"""What a training writes of its weights.

Modules in reading order:
    checkpoint  OUT/checkpoints: folders that exist whole or not at all; imports no torch
    store       weights and optimizer into a checkpoint and back; the tuned model in OUT/model
    publish     OUT/weights, and the servers that load them while the training goes on
"""
