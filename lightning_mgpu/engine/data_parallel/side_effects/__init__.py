"""What a step changes beside its outputs, brought from the replicas to the master."""
