"""Transfer a step's side effects from the replicas to the master."""
