"""What is done with a trained model: restoring it, generation, evaluation."""
