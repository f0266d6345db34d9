"""Plain data: masks, layouts, schedules. No process group, no device, no FX graph."""
