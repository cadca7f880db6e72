"""What a run will need, before any device is paid for: memory, communication and time of every layout."""
