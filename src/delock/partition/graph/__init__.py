"""Splits any module: its computation as a graph, the places where the graph can be cut, and one module per piece."""
