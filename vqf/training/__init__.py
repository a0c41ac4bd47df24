"""Training: the trainer and its tasks, GAN, EMA, alarms and time budget."""
