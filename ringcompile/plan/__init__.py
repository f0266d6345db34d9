"""Plans: from a mask and a layout to the schedule that all ranks run. Plain data."""
