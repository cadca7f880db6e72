"""What an agent keeps of a long text: summaries, chunks that it may look up again, and what it has looked up."""
