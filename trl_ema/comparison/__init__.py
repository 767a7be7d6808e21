"""Several ways to fine-tune on the same data, seeds and steps: the plan, the runs, the figures and the report."""
