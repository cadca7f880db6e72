"""Stage B: what lets a pretrained model learn while it reads."""
