"""What a run survives: signals that ask it to end, and time that runs out."""
