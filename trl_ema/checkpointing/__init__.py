"""Whole checkpoints with everything a run goes on from, under any launch, and stops in between."""
