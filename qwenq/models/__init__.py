"""Define what a model is: checkpoints read and written, layouts, tokenizers, shapes."""
