"""What a model is: reading and writing checkpoints, layouts, tokenizers, shapes."""
