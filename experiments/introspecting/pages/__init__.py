"""What the page shows of each suite's findings."""
