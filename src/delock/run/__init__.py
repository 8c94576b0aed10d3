"""From a request to a result: a run is checked, measured, cut, started and collected."""
