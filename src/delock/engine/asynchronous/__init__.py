"""Free-running stages: replay buffers, the plans of such runs, their links and their runner."""
