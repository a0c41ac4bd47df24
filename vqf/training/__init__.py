"""Training: the trainer, the tokenizer and prior tasks, GAN, EMA, optimizer step, alarms, time budget."""
