"""What a sweep keeps on disk: its journal, results, and the state it resumes from."""
