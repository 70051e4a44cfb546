"""The mixture of experts of one layer, computed in several equal ways."""
