"""Parameter-efficient fine-tuning: converters that freeze a model and add, or leave, a few parameters to train."""
