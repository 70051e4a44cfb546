"""The run folder: what lies where, its lock, its papers, its plot."""
