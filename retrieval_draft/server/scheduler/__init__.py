"""Queue, fair turns and the thread that decodes."""
