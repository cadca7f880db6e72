"""The memory agent: it reads a long text chunk by chunk, decides what to keep and to look up, and answers."""
