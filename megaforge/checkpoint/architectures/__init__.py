"""Published architectures: what each of them computes, and what it calls its settings and its tensors."""
