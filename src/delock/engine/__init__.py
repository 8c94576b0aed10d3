"""The engine: it walks a plan over stages and links."""
