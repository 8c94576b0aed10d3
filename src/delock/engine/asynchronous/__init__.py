"""Free-running stages: their replay buffers, plans, links and runner."""
