"""How `ddp` starts its ranks, deals samples to them and collects predictions."""
