"""The tokenizer of stage 1 and the generator of stage 2."""
